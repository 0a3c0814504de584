"""Inference: a trained model loaded without its training, and texts that it continues."""
