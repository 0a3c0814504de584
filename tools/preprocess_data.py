"""Tokenize documents into the .bin/.idx files that training reads: the command line of megatron_lsh/data/preparation."""

from __future__ import annotations

import sys

from megatron_lsh.data.preparation.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
