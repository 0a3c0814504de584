#!/usr/bin/env python
"""Let a native checkpoint continue texts, token by token as they are drawn.

    python tools/generate.py --help

Without a checkout: python -m megatron_lsh generate
"""

import sys

from megatron_lsh.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
