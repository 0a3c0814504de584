# Sourced by every launcher in this folder: the models, their data and schedules, once, and a `launch` function.
# shellcheck shell=bash
#
# Every launcher passes further flags on, and the last value of a flag wins:
#     MODEL=bert scripts/pretrain_moe_8gpu.sh --train-iters 1000 --moe-token-dispatcher-type alltoall
# Environment variables:
#     MODEL            gpt (the default), bert, t5 or swin
#     DATA_PATH        prefix of the .bin/.idx files, for swin a folder of pictures   (default: the corpus that `make data MODEL=...` prepares)
#     TOKENIZER_MODEL  its tokenizer (or vocabulary file), of kind TOKENIZER_TYPE   (default: the one trained on that corpus)
#     RUN_DIR          checkpoints, TensorBoard files, metrics; a run continues from the checkpoints it finds there
#     TRAIN_ITERS      length of the run
#     PRESET           which of the published models, for swin (default: swin-moe-s32)
#     DRY_RUN=1        print the parallel layout, parameter counts and a memory estimate instead of training
#     TORCHRUN         the launcher itself (default: torchrun)

MODEL=${MODEL:-gpt}
RUN_DIR=${RUN_DIR:-runs/$MODEL-moe-base}
TRAIN_ITERS=${TRAIN_ITERS:-50000}

source scripts/launch.sh

# About the models of the LSH-MoE paper: MoE in every other layer, top-2 of 16 experts.
case $MODEL in
gpt) # about the paper's smaller GPT: 12 layers of width 768
    ENTRY=pretrain_gpt_moe.py
    DATA_PATH=${DATA_PATH:-data/stdlib/stdlib_text_document}
    TOKENIZER_TYPE=${TOKENIZER_TYPE:-GPTSentencePieceTokenizer}
    TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/stdlib/tokenizer.model}
    MODEL_FLAGS=(
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --moe-ffn-hidden-size 3072
        --seq-length 1024 --max-position-embeddings 1024
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --lr 3e-4 --min-lr 3e-5
    )
    ;;
bert) # RoBERTa-MoE: 12 layers of width 768, masked tokens only (without the last flag of the model: sentence order, too)
    ENTRY=pretrain_bert_moe.py
    DATA_PATH=${DATA_PATH:-data/stdlib/stdlib_bert_text_sentence}
    TOKENIZER_TYPE=${TOKENIZER_TYPE:-BertWordPieceCase}
    TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/stdlib/vocab.txt}
    MODEL_FLAGS=(
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --moe-ffn-hidden-size 3072
        --seq-length 512 --max-position-embeddings 512 --bert-no-binary-head --lr 2e-4 --min-lr 2e-5
    )
    ;;
t5) # T5-MoE: 16 layers of width 1024 in the encoder and as many in the decoder, experts of width 16384
    ENTRY=pretrain_t5_moe.py
    DATA_PATH=${DATA_PATH:-data/stdlib/stdlib_t5_text_sentence}
    TOKENIZER_TYPE=${TOKENIZER_TYPE:-SentencePieceTokenizer}
    TOKENIZER_MODEL=${TOKENIZER_MODEL:-data/stdlib/tokenizer.model}
    MODEL_FLAGS=(
        --encoder-num-layers 16 --decoder-num-layers 16 --hidden-size 1024 --num-attention-heads 16
        --ffn-hidden-size 16384 --moe-ffn-hidden-size 16384 --encoder-seq-length 512 --decoder-seq-length 128
        --position-embedding-type relative --normalization RMSNorm --disable-bias-linear --vocab-extra-ids 100
        --lr 1e-4 --min-lr 1e-5
    )
    ;;
swin) # Swin-MoE-S with 32 experts as Microsoft trained it on ImageNet-22K, or another PRESET
    ENTRY=pretrain_swin_moe.py
    DATA_PATH=${DATA_PATH:-data/imagenet}
    TOKENIZER_TYPE=none
    MODEL_FLAGS=(--preset "${PRESET:-swin-moe-s32}" --lr 2.5e-4 --min-lr 2.5e-6)
    ;;
*)
    echo "MODEL ($MODEL) must be gpt, bert, t5 or swin" >&2
    exit 1
    ;;
esac
case $TOKENIZER_TYPE in
none) TOKENIZER_FLAGS=() ;;
BertWordPiece*) TOKENIZER_FLAGS=(--tokenizer-type "$TOKENIZER_TYPE" --vocab-file "$TOKENIZER_MODEL") ;;
*) TOKENIZER_FLAGS=(--tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER_MODEL") ;;
esac
MOE_FLAGS=(
    --num-experts 16 --moe-layer-freq 2 --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 --moe-grouped-gemm
)
TRAINING_FLAGS=(
    --micro-batch-size 8 --global-batch-size 256 --train-iters "$TRAIN_ITERS" --bf16
    --lr-decay-style cosine --lr-warmup-fraction 0.01 --attention-dropout 0.0 --hidden-dropout 0.0
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0 --use-distributed-optimizer
)
# shellcheck disable=SC2054  # the commas are in a flag's value
DATA_FLAGS=(--data-path "$DATA_PATH" --split 969,30,1 "${TOKENIZER_FLAGS[@]}")
if [ "$MODEL" = swin ]; then # the preset has its experts; learning rate for 1,024 pictures
    MOE_FLAGS=()
    TRAINING_FLAGS=(
        --micro-batch-size 64 --global-batch-size 1024 --train-iters "$TRAIN_ITERS" --bf16
        --lr-decay-style cosine --lr-warmup-fraction 0.11 --weight-decay 0.1 --clip-grad 3.0 --use-distributed-optimizer
    )
    DATA_FLAGS=(--data-path "$DATA_PATH")
fi
# The same folder to save and to load: starting a run again continues it.
RUN_FLAGS=(
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --save-interval 1000 --save-retain-interval 10000
    --eval-interval 1000 --eval-iters 10 --log-interval 10
    --tensorboard-dir "$RUN_DIR/tensorboard" --metrics-jsonl "$RUN_DIR/metrics.jsonl" --log-throughput
)
ALL_FLAGS=("${MODEL_FLAGS[@]}" "${MOE_FLAGS[@]}" "${TRAINING_FLAGS[@]}" "${DATA_FLAGS[@]}" "${RUN_FLAGS[@]}")

# launch WORLD_SIZE "torchrun arguments" FLAGS...   start the entry script on this machine, or only describe the run. Does not return:
# this process becomes torchrun, which so gets every signal that the launcher is sent.
launch() {
    local world_size=$1
    local -a torchrun_arguments
    read -r -a torchrun_arguments <<<"$2"
    shift 2
    if [ "${DRY_RUN:-0}" = 1 ]; then
        exec python "$ENTRY" "${ALL_FLAGS[@]}" "$@" --dry-run --world-size "$world_size"
    else
        exec ${TORCHRUN:-torchrun} "${torchrun_arguments[@]}" "$ENTRY" "${ALL_FLAGS[@]}" "$@"
    fi
}
