#!/usr/bin/env python
"""Tokenize documents into the .bin/.idx files that training reads: the command line of megatron_lsh/data/preparation.

    python tools/preprocess_data.py --help

Without a checkout: python -m megatron_lsh preprocess_data
"""

import sys

from megatron_lsh.commands.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
