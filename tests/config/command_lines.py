"""Command lines that several tests start from."""

from __future__ import annotations

import pytest

from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.errors import ConfigError

# NVIDIA's published command line for Mixtral 8x7B, as it stands.
_MIXTRAL = """
--disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32 --hidden-size 4096
--ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0
--normalization RMSNorm --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights
--group-query-attention --num-query-groups 8 --no-masked-softmax-fusion --no-position-embedding --num-experts 8
--expert-model-parallel-size 8 --moe-router-load-balancing-type aux_loss --moe-router-topk 2 --moe-aux-loss-coeff 1e-2
--moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall --tokenizer-type Llama2Tokenizer
--tokenizer-model T --data-path D --split 99990,8,2 --micro-batch-size 1 --global-batch-size 256 --lr 1e-4
--train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1
--lr-warmup-iters 500 --clip-grad 1.0 --bf16 --overlap-grad-reduce --overlap-param-gather
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 8
--sequence-parallel --use-distributed-optimizer --log-interval 1 --save-interval 10000 --eval-interval 1000
--eval-iters 10 --save S --load L --tensorboard-dir TB --ckpt-format torch_dist --auto-detect-ckpt-format
"""

_SMALL = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3 --train-iters 10
--mock-data --num-experts 8 --moe-aux-loss-coeff 0.01
"""

MIXTRAL = _MIXTRAL.split()
SMALL = _SMALL.split()


def small(flags: str = "", world_size: int = 1) -> Config:
    """SMALL with further flags (which win), validated."""
    return validate(parse_args(SMALL + flags.split()), world_size)


DENSE = [word for word in SMALL if word not in ("--num-experts", "8", "--moe-aux-loss-coeff", "0.01")]


def lines_for(flags: str, world_size: int = 1, base: list[str] = SMALL) -> list[str]:
    cfg = parse_args([*base, *flags.split()])
    with pytest.raises(ConfigError) as error:
        validate(cfg, world_size)
    return str(error.value).splitlines()


def without(flag: str, base: list[str] = SMALL) -> list[str]:
    at = base.index(flag)
    return base[:at] + base[at + 2 :]
