"""Preparation: text files to token files. ``tools/preprocess_data.py`` is the command line of this room."""
