"""Fine-tune a pretrained GPT, BERT or T5 encoder, dense or with experts, to classify texts; see docs/finetuning.md.

    torchrun --nproc-per-node 2 finetune_classification.py --config runs/gpt/checkpoints/config.json \\
        --pretrained-checkpoint runs/gpt/checkpoints --train-data train.jsonl --valid-data valid.jsonl ...
"""

import sys

from megatron_lsh.config import parse_classification_args
from megatron_lsh.training.main import main

if __name__ == "__main__":
    sys.exit(main(parse_classification_args))
