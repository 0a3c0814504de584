#!/usr/bin/env bash
# One GPU holds all experts: nothing crosses a network, so the plain dispatcher is the right one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/moe_flags.sh

launch 1 "--standalone --nproc-per-node 1" \
    --expert-model-parallel-size 1 --moe-token-dispatcher-type alltoall "$@"
