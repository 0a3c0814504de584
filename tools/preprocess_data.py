"""Tokenize documents into the .bin/.idx files that training reads. See --help, and megatron_lsh/data/preprocess.py."""

from __future__ import annotations

import sys

from megatron_lsh.data.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
