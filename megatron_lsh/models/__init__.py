"""Attention, feed-forward layers and the transformer block; GPT, BERT, T5 and classifiers on top of them."""
