#!/usr/bin/env bash
# Several machines without a scheduler: run the same command on each, with its own NODE_RANK.
#     NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/pretrain_moe_multinode.sh      # on the first machine
#     NNODES=4 NODE_RANK=1 MASTER_ADDR=10.0.0.1 scripts/pretrain_moe_multinode.sh      # on the second, and so on
# NPROC is the number of ranks per machine (default 8). --save must name a folder that all machines share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/moe_flags.sh

: "${NNODES:?set NNODES to the number of machines}"
: "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}"
: "${MASTER_ADDR:?set MASTER_ADDR to the address of machine 0}"
NPROC=${NPROC:-8}

launch $((NNODES * NPROC)) \
    "--nnodes $NNODES --node-rank $NODE_RANK --nproc-per-node $NPROC --master-addr $MASTER_ADDR --master-port ${MASTER_PORT:-29500}" \
    --expert-model-parallel-size 16 --moe-token-dispatcher-type lsh "$@"
