#!/usr/bin/env python
"""Find the layout and the dispatch with the least time per step on a cluster, before anything is started.

    python tools/plan.py --help

Without a checkout: python -m megatron_lsh plan
"""

import sys

from megatron_lsh.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
