"""Data: indexed token files, tokenizers, samples, blends and the loader.

Only `loader` imports torch, so that the tools and their worker processes start fast.
"""
