#!/usr/bin/env bash
# What `make pretrain` runs once the environment is there:
#   1. scripts/prepare_readme_data.sh: corpus, tokenizer and .bin/.idx files, once, in data/stdlib/
#   2. torchrun on every GPU, or on two CPU processes, experts spread over all ranks, LSH-compressed all-to-all
# Settings come from the environment (the Makefile passes its variables on), MODEL among them; arguments are further flags of
# pretrain_gpt_moe.py, pretrain_bert_moe.py, pretrain_t5_moe.py or pretrain_swin_moe.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
MODEL=${MODEL:-gpt}
ITERS=${ITERS:-$([ "$MODEL" = swin ] && echo 500 || echo 300)}
RUN_DIR=${RUN_DIR:-runs/$MODEL-moe-lsh}
DATA_DIR=${DATA_DIR:-$([ "$MODEL" = swin ] && echo data/digits || echo data/stdlib)}
NPROC=${NPROC:-}

there() { printf %q "$RUN_DIR"; } # as a shell takes it
say() { echo "[pretrain] $*"; }
fail() {
    echo "[pretrain] ERROR: $*" >&2
    exit 1
}

[[ $MODEL =~ ^(gpt|bert|t5|swin)$ ]] || fail "MODEL=$MODEL must be gpt, bert, t5 or swin"
[ -x "$VENV/bin/torchrun" ] || fail "$VENV has no torchrun: run make install first"
[[ $ITERS =~ ^[1-9][0-9]*$ ]] || fail "ITERS=$ITERS must be a number of iterations, at least 1"
[[ $NPROC =~ ^([1-9][0-9]*)?$ ]] || fail "NPROC=$NPROC must be a number of ranks, at least 1"
PATH="$(cd "$VENV/bin" && pwd):$PATH"
VIRTUAL_ENV=$VENV source scripts/launch.sh

# --- An earlier run is neither continued nor overwritten unless asked for.

in_words() { # what newest_checkpoint found
    case $1 in
    damaged) echo "not known, because its tracker file is damaged" ;;
    release) echo "the one it starts from (release)" ;;
    *) echo "of iteration $1" ;;
    esac
}
move_aside() {
    local number=1
    while [ -e "$RUN_DIR.$number" ] || [ -L "$RUN_DIR.$number" ]; do number=$((number + 1)); done
    mv "$RUN_DIR" "$RUN_DIR.$number"
    say "moved what was in $RUN_DIR to $RUN_DIR.$number"
}

again="make pretrain"
[ "$MODEL" = gpt ] || again+=" MODEL=$MODEL"
before=$(newest_checkpoint "$RUN_DIR/checkpoints")
if [ "${RESUME:-}" = 1 ] && [ "${RESTART:-}" = 1 ]; then
    fail "RESUME=1 and RESTART=1 exclude each other"
elif [ "${RESUME:-}" = 1 ]; then
    [ -n "$before" ] || fail "nothing to resume: $RUN_DIR holds no checkpoint. Start with: $again RUN_DIR=$(there)"
    say "resuming $RUN_DIR; its newest checkpoint is $(in_words "$before")"
elif [ -n "$before" ] && [ "${RESTART:-}" != 1 ]; then
    say "$RUN_DIR holds an earlier run; its newest checkpoint is $(in_words "$before"). Nothing was started or changed."
    say "  continue it:   $again RESUME=1 RUN_DIR=$(there)    (add ITERS=N for a longer run)"
    say "  start afresh:  $again RESTART=1 RUN_DIR=$(there)   (moves the earlier run aside)"
    say "  or elsewhere:  $again RUN_DIR=runs/another-name"
    exit 1
elif [ -e "$RUN_DIR" ]; then
    move_aside
fi

# --- Ranks: every GPU, else two processes that share the cores.

read -r device gpus cores < <(python - <<'PYTHON'
import os
import torch

gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
print("cuda" if gpus else "cpu", gpus, cores)
PYTHON
)
if [ "$device" = cuda ]; then
    ranks=${NPROC:-$gpus}
    [ "$ranks" -le "$gpus" ] || fail "NPROC=$ranks, but there are $gpus GPUs"
    device_flags=(--bf16)
    say "$ranks of $gpus GPUs"
else
    ranks=${NPROC:-2}
    device_flags=(--device cpu)
    say "no GPU: $ranks CPU process(es) over gloo on $cores cores"
fi
export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))

# --- Data, once.

scripts/prepare_readme_data.sh "$DATA_DIR" "$MODEL"

# --- Training. Experts: eight, or the next multiple of the ranks.

experts=$(((8 + ranks - 1) / ranks * ranks))
at_least_1() { echo $(($1 > 0 ? $1 : 1)); }

case $MODEL in
gpt)
    sequences=12
    model_flags=(
        --num-layers 4 --seq-length 256 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --data-path "$DATA_DIR/stdlib_text_document"
        --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$DATA_DIR/tokenizer.model"
        --sample-prompt "def main():" --lr 3e-3 --min-lr 3e-4
    )
    ;;
bert) # at 256 tokens and a learning rate of 1e-3, hidden states became alike and stayed so
    sequences=24
    model_flags=(
        --num-layers 4 --seq-length 128 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --data-path "$DATA_DIR/stdlib_bert_text_sentence"
        --tokenizer-type BertWordPieceCase --vocab-file "$DATA_DIR/vocab.txt" --lr 5e-4 --min-lr 5e-5
    )
    ;;
t5)
    sequences=24
    model_flags=(
        --encoder-num-layers 3 --decoder-num-layers 3 --encoder-seq-length 128 --decoder-seq-length 48
        --position-embedding-type relative --normalization RMSNorm --disable-bias-linear
        --data-path "$DATA_DIR/stdlib_t5_text_sentence" --vocab-extra-ids 100
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA_DIR/tokenizer.model" --lr 1e-3 --min-lr 1e-4
    )
    ;;
swin) # pictures of 32 x 32 in shades of grey, which are shifted and turned a little and never mirrored
    sequences=64
    model_flags=(
        --data-path "$DATA_DIR" --img-h 32 --num-channels 1 --patch-dim 2 --swin-window-size 4 --swin-depths 2 2 2
        --image-mean 0.13 --image-std 0.31 --eval-crop-ratio 1 --crop-scale 1 1 --hflip 0 --randaugment-ops 0
        --random-shift 2 --random-rotation 10 --random-erasing 0 --mixup 0 --cutmix 0 --lr 1e-3 --min-lr 1e-5
    )
    ;;
esac
if [ "$MODEL" = swin ]; then # widths of the first of three stages
    model_flags+=(
        --hidden-size 48 --num-attention-heads 2 --moe-router-topk 1 --moe-expert-capacity-factor 1.25
        --weight-decay 0.05 --clip-grad 3.0 --picture-sheet "$RUN_DIR/pictures.png"
    )
else
    # shellcheck disable=SC2054  # the commas are in a flag's value
    model_flags+=(
        --hidden-size 256 --num-attention-heads 4 --attention-dropout 0.0 --hidden-dropout 0.0 --moe-ffn-hidden-size 512
        --moe-router-topk 2 --weight-decay 0.1 --adam-beta2 0.95 --split 95,5,0
    )
fi
micro_batch=$((ranks < sequences ? sequences / ranks : 1))
flags=(
    "${model_flags[@]}" --num-experts "$experts" --moe-aux-loss-coeff 1e-2
    --expert-model-parallel-size "$ranks" --moe-token-dispatcher-type lsh
    --micro-batch-size "$micro_batch" --global-batch-size $((micro_batch * ranks)) --train-iters "$ITERS"
    --lr-decay-style cosine --lr-warmup-fraction 0.1
    --eval-interval "$(at_least_1 $((ITERS / 5)))" --eval-iters 8 --log-interval "$(at_least_1 $((ITERS / 30)))"
    --save "$RUN_DIR/checkpoints" --save-interval "$(at_least_1 $((ITERS / 3)))"
    --tensorboard-dir "$RUN_DIR/tensorboard" --metrics-jsonl "$RUN_DIR/metrics.jsonl"
    "${device_flags[@]}"
)
if [ "${RESUME:-}" = 1 ]; then
    flags+=(--load "$RUN_DIR/checkpoints" --override-opt-param-scheduler) # a longer run has a longer schedule
fi

mkdir -p "$RUN_DIR"
status=0
# tee outlives every signal, so that what the ranks say while they save is still seen and kept.
exec 3> >(trap '' INT HUP TERM && exec tee -a "$RUN_DIR/log.txt")
tee=$!
supervise torchrun --standalone --nproc-per-node "$ranks" "pretrain_${MODEL}_moe.py" "${flags[@]}" "$@" >&3 2>&1 || status=$?
exec 3>&-
wait "$tee" || true
after=$(newest_checkpoint "$RUN_DIR/checkpoints")
if ((status != 0)) && [ -n "$after" ] && [ "$after" != "$before" ]; then
    say "stopped; the newest checkpoint is $(in_words "$after"). Continue with: $again RESUME=1 RUN_DIR=$(there)"
fi
exit "$status"
