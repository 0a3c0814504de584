"""Samples: what a dataset is, and how each kind of model's samples are made of token files or labelled texts."""
