"""Fine-tune a pretrained GPT, BERT or T5 encoder, dense or with experts, to classify texts; see docs/finetuning.md.

    torchrun --nproc-per-node 2 finetune_classification.py FLAGS

Without a checkout: torchrun --nproc-per-node 2 -m megatron_lsh finetune_classification FLAGS
"""

import sys

from megatron_lsh.commands.finetune_classification import main

if __name__ == "__main__":
    sys.exit(main())
