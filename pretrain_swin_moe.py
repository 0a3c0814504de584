"""Pretrain or fine-tune a Swin or Swin-MoE on labelled pictures. Flags are Megatron-LM's; see --help and docs/vision.md.

    torchrun --nproc-per-node 2 pretrain_swin_moe.py FLAGS

Without a checkout: torchrun --nproc-per-node 2 -m megatron_lsh pretrain_swin_moe FLAGS
"""

import sys

from megatron_lsh.commands.pretrain_swin_moe import main

if __name__ == "__main__":
    sys.exit(main())
