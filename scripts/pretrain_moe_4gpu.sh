#!/usr/bin/env bash
# Four GPUs: data parallel for the dense layers, four experts on each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/moe_flags.sh

launch 4 "--standalone --nproc-per-node 4" \
    --expert-model-parallel-size 4 --moe-token-dispatcher-type lsh "$@"
