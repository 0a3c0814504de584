"""Pretrain a GPT with mixture-of-experts layers. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_gpt_moe.py FLAGS

Without a checkout: torchrun --nproc-per-node 2 -m megatron_lsh pretrain_gpt_moe FLAGS
"""

import sys

from megatron_lsh.commands.pretrain_gpt_moe import main

if __name__ == "__main__":
    sys.exit(main())
