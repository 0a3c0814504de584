#!/usr/bin/env python
"""What LSH merges in a text under a trained model, on one HTML page.

    python tools/see_merges.py --help

Without a checkout: python -m megatron_lsh see_merges
"""

import sys

from megatron_lsh.commands.see_merges import main

if __name__ == "__main__":
    sys.exit(main())
