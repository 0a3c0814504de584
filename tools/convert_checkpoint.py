#!/usr/bin/env python
"""Convert checkpoints between Hugging Face, this framework and Megatron-LM's legacy format, and dense models to MoE.

    python tools/convert_checkpoint.py --help

Without a checkout: python -m megatron_lsh convert_checkpoint
"""

import sys

from megatron_lsh.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
