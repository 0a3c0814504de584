"""Pretrain a T5 with mixture-of-experts layers in encoder and decoder. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_t5_moe.py --encoder-num-layers 4 --decoder-num-layers 4 --hidden-size 128 ...
"""

import sys

from megatron_lsh.families import T5
from megatron_lsh.training.main import main

if __name__ == "__main__":
    sys.exit(main(T5.parse))
