#!/usr/bin/env bash
# Two GPUs: data parallel for the dense layers, eight experts on each, LSH-compressed all-to-all between them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/moe_flags.sh

launch 2 "--standalone --nproc-per-node 2" \
    --expert-model-parallel-size 2 --moe-token-dispatcher-type lsh "$@"
