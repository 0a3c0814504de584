#!/usr/bin/env bash
# Fine-tune a pretrained model to tell 20 newsgroups apart: the texts are prepared once, then torchrun on all GPUs, or on two
# CPU processes.
#     scripts/finetune_newsgroups.sh runs/gpt-moe-lsh/checkpoints [FLAGS...]
# The first argument is the --save folder of a pretraining run (GPT, BERT or T5), whose config.json describes the model. Further
# flags win: --moe-token-dispatcher-type alltoall, --epochs 5, --lr 3e-4, ...
# Environment variables:
#     NPROC      ranks (default: every GPU, else 2); the experts are spread over all of them
#     DATA_DIR   where the texts are, or are put   (default: data/20newsgroups)
#     RUN_DIR    checkpoints, TensorBoard files, metrics   (default: runs/newsgroups); a run continues from what it finds there
#     TORCHRUN   the launcher itself (default: torchrun)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PRETRAINED=${1:?"give the --save folder of a pretraining run"}
shift
DATA_DIR=${DATA_DIR:-data/20newsgroups}
RUN_DIR=${RUN_DIR:-runs/newsgroups}

source scripts/launch.sh
if [ ! -f "$PRETRAINED/config.json" ]; then
    echo "$PRETRAINED has no config.json: give the --save folder of a pretraining run" >&2
    exit 1
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
NPROC=${NPROC:-$((gpus > 0 ? gpus : 2))}
if ((gpus > 0)); then device_flags=(--bf16); else device_flags=(--device cpu); fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[ -f "$DATA_DIR/test.jsonl" ] || python tools/prepare_20newsgroups.py --output-dir "$DATA_DIR"

# The same folder to save and to load: starting a run again continues it. This process becomes torchrun, which so gets every signal.
exec ${TORCHRUN:-torchrun} --standalone --nproc-per-node "$NPROC" finetune_classification.py \
    --config "$PRETRAINED/config.json" --pretrained-checkpoint "$PRETRAINED" \
    --train-data "$DATA_DIR/train.jsonl" --valid-data "$DATA_DIR/valid.jsonl" --test-data "$DATA_DIR/test.jsonl" \
    --epochs 3 --early-stopping-patience 1 --micro-batch-size 16 --expert-model-parallel-size "$NPROC" \
    --lr 1e-3 --lr-decay-style linear --lr-warmup-fraction 0.1 --weight-decay 0.01 --log-interval 20 \
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" \
    --tensorboard-dir "$RUN_DIR/tensorboard" --metrics-jsonl "$RUN_DIR/metrics.jsonl" "${device_flags[@]}" "$@"
