#!/usr/bin/env python
"""Measure the share of the all-to-all in a training step, exact and with LSH, for your model on your cluster.

    python tools/profile_alltoall.py --help

Without a checkout: python -m megatron_lsh profile_alltoall
"""

import sys

from megatron_lsh.commands.profile_alltoall import main

if __name__ == "__main__":
    sys.exit(main())
