# Sourced by every launcher in this folder: the model, its data and its schedule, once, and a `launch` function.
# shellcheck shell=bash
#
# Every launcher passes further flags on, and the last value of a flag wins:
#     scripts/pretrain_gpt_moe_8gpu.sh --train-iters 1000 --moe-token-dispatcher-type alltoall
# Environment variables:
#     DATA_PATH        prefix of the .bin/.idx files   (default: the corpus that `make pretrain` prepared)
#     TOKENIZER_MODEL  its tokenizer, of kind TOKENIZER_TYPE   (default: the one trained on that corpus)
#     RUN_DIR          checkpoints, TensorBoard files, metrics; a run continues from the checkpoints it finds there
#     TRAIN_ITERS      length of the run
#     DRY_RUN=1        print the parallel layout, parameter counts and a memory estimate instead of training
#     TORCHRUN         the launcher itself (default: torchrun)

DATA_PATH=${DATA_PATH:-data/stdlib/stdlib_text_document}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-GPTSentencePieceTokenizer}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/stdlib/tokenizer.model}
RUN_DIR=${RUN_DIR:-runs/gpt-moe-base}
TRAIN_ITERS=${TRAIN_ITERS:-50000}

# Use the virtual environment that the Makefile made, unless the user has activated another one.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/torchrun ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

# About the smaller model of the LSH-MoE paper: 12 layers of width 768 with MoE in every other layer, top-2 of 16 experts.
MODEL_FLAGS=(
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0.0 --hidden-dropout 0.0 --untie-embeddings-and-output-weights
)
MOE_FLAGS=(
    --num-experts 16 --moe-layer-freq 2 --moe-ffn-hidden-size 3072 --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 --moe-grouped-gemm
)
TRAINING_FLAGS=(
    --micro-batch-size 8 --global-batch-size 256 --train-iters "$TRAIN_ITERS" --bf16
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --use-distributed-optimizer
)
DATA_FLAGS=(
    --data-path "$DATA_PATH" --split 969,30,1 --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER_MODEL"
)
# The same folder to save and to load: starting a run again continues it.
RUN_FLAGS=(
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --save-interval 1000 --save-retain-interval 10000
    --eval-interval 1000 --eval-iters 10 --log-interval 10
    --tensorboard-dir "$RUN_DIR/tensorboard" --metrics-jsonl "$RUN_DIR/metrics.jsonl" --log-throughput
)
GPT_MOE_FLAGS=("${MODEL_FLAGS[@]}" "${MOE_FLAGS[@]}" "${TRAINING_FLAGS[@]}" "${DATA_FLAGS[@]}" "${RUN_FLAGS[@]}")

# launch WORLD_SIZE "torchrun arguments" FLAGS...   start pretrain_gpt_moe.py on this machine, or only describe the run.
launch() {
    local world_size=$1
    local -a torchrun_arguments
    read -r -a torchrun_arguments <<<"$2"
    shift 2
    if [ "${DRY_RUN:-0}" = 1 ]; then
        python pretrain_gpt_moe.py "${GPT_MOE_FLAGS[@]}" "$@" --dry-run --world-size "$world_size"
    else
        ${TORCHRUN:-torchrun} "${torchrun_arguments[@]}" pretrain_gpt_moe.py "${GPT_MOE_FLAGS[@]}" "$@"
    fi
}
