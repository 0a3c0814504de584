"""Compressors: what makes fewer rows of many, and the rows of all tokens from what comes back."""
