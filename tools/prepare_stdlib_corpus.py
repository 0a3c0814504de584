#!/usr/bin/env python
"""A corpus without a download: the Python standard library's own sources, and tokenizers trained on them.

    python tools/prepare_stdlib_corpus.py --help

Without a checkout: python -m megatron_lsh prepare_stdlib_corpus
"""

import sys

from megatron_lsh.commands.prepare_stdlib_corpus import main

if __name__ == "__main__":
    sys.exit(main())
