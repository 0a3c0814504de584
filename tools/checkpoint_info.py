#!/usr/bin/env python
"""Say what is in a checkpoint: layout, step, tokens seen, sizes, and whether every file is as it was written.

    python tools/checkpoint_info.py --help

Without a checkout: python -m megatron_lsh checkpoint_info
"""

import sys

from megatron_lsh.commands.checkpoint_info import main

if __name__ == "__main__":
    sys.exit(main())
