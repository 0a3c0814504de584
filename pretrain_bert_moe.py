"""Pretrain a BERT or RoBERTa with mixture-of-experts layers. Flags are Megatron-LM's; see --help and the README.

    torchrun --nproc-per-node 2 pretrain_bert_moe.py --num-layers 4 --hidden-size 128 ... --moe-token-dispatcher-type lsh
"""

import sys

from megatron_lsh.families import BERT
from megatron_lsh.training.main import main

if __name__ == "__main__":
    sys.exit(main(BERT.parse))
