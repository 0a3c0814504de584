#!/usr/bin/env python
"""Compare runs on one HTML page: loss against steps, tokens, seconds and bytes; where time goes; what compression did.

    python tools/report.py --help

Without a checkout: python -m megatron_lsh report
"""

import sys

from megatron_lsh.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
