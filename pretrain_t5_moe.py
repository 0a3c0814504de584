"""Pretrain a T5 with mixture-of-experts layers in encoder and decoder. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_t5_moe.py FLAGS

Without a checkout: torchrun --nproc-per-node 2 -m megatron_lsh pretrain_t5_moe FLAGS
"""

import sys

from megatron_lsh.commands.pretrain_t5_moe import main

if __name__ == "__main__":
    sys.exit(main())
