"""``python -m megatron_lsh COMMAND``: every program of this package, without a checkout."""

import sys

from megatron_lsh.commands import run

if __name__ == "__main__":
    sys.exit(run())
