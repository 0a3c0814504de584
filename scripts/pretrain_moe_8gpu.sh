#!/usr/bin/env bash
# Eight GPUs: dense layers in tensor-parallel pairs (TP 2 x DP 4), two experts on each GPU (EP 8). The expert groups need not
# divide the data-parallel size: dense and expert parameters cut the same eight ranks in two different ways.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/moe_flags.sh

tensor_parallel=(--tensor-model-parallel-size 2 --sequence-parallel)
[ "$MODEL" != swin ] || tensor_parallel=() # its first stages have few heads
launch 8 "--standalone --nproc-per-node 8" \
    "${tensor_parallel[@]}" --expert-model-parallel-size 8 --moe-token-dispatcher-type lsh "$@"
