#!/usr/bin/env python
"""The perplexity of a text file under a native checkpoint, and its bits per byte.

    python tools/perplexity.py --help

Without a checkout: python -m megatron_lsh perplexity
"""

import sys

from megatron_lsh.commands.perplexity import main

if __name__ == "__main__":
    sys.exit(main())
