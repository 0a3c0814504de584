"""Labelled pictures: where they are read, how they are decoded, changed for training and mixed in pairs."""
