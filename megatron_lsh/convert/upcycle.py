"""A dense model as a mixture of experts (sparse upcycling, Komatsuzaki et al., arXiv:2212.05055; granular: He et al.,
arXiv:2410.07524).

Granularity G cuts the dense feed-forward layer of width F into G slices of width F/G, whose outputs sum to its own. Expert
e holds slice e mod G, and the router scores the E/G experts of every slice alike: it has E/G different rows, each repeated
G times in succession. So the K chosen experts are K/G whole sets of slices, each set with the weight w_j / G of its
row. Multiplying fc2 by G makes the layer sum_j w_j FFN(x): with weights that add up to one, the dense layer itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lsh.config import Config
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.convert.architecture import moe_pattern
from megatron_lsh.convert.source import Origin, Rows, Source, TensorSpec, model_shapes, refuse_untrainable, row_by_row
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.parallel.random import derive_seed

_EXPERTS, _ROUTER = ".mlp.experts.", ".mlp.router."


class UpcycledSource:
    """The mixture of experts that `moe` describes, made from a dense model.

    Args:
        dense: a model without experts.
        moe: num_experts, topk, scoring, which layers. Width of an expert: that of the dense layer / granularity.
        granularity: G; must divide the width, the number of experts and top-k.
        seed: of the routers' weights, which are those that a fresh model with this ``--seed`` starts with.

    Raises CheckpointError for a source with experts, or numbers that do not fit.

    `notices` says if the first logits will not equal the dense model's.
    """

    def __init__(self, dense: Source, moe: MoEConfig, granularity: int = 1, seed: int = 1234) -> None:
        self.what = f"{dense.what} (upcycled)"
        self.cfg = _configure(dense, moe, granularity)
        self._dense, self._granularity, self._seed = dense, granularity, seed
        self.notices = _warnings(self.cfg.moe)
        self.tensors: dict[str, TensorSpec] = {}
        for name, shape in model_shapes(self.cfg).items():
            self.tensors[name] = TensorSpec(shape, dense.tensors[_dense_name(name)].dtype)
        self.origin = Origin(_token_ids(dense.origin.hf_config), dense.origin.files, tokenizer=dense.origin.tokenizer)
        self._last: tuple[str, Tensor] | None = None

    def pieces(self, name: str) -> list[Rows]:
        if _EXPERTS in name:
            return row_by_row(name, self.tensors[name])
        if name in self._dense.tensors:
            return self._dense.pieces(name)
        return [Rows(name, 0, self.tensors[name].shape[0])]

    def read(self, rows: Rows) -> Tensor:
        spec = self.tensors[rows.name]
        if _ROUTER in rows.name:
            return self._router(rows.name, spec)
        if _EXPERTS not in rows.name:
            return self._dense.read(rows)
        return torch.stack([self._expert(rows.name, rows.first + number) for number in range(rows.count)])

    def culprits(self, rows: Rows) -> list[str]:
        name = _dense_name(rows.name)
        return self._dense.culprits(self._dense.pieces(name)[0]) if name in self._dense.tensors else [name]

    def _router(self, name: str, spec: TensorSpec) -> Tensor:
        """Random, but the same for the G slices of every copy of the dense layer."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, name))
        weight = torch.empty(spec.shape).normal_(0.0, self.cfg.model.init_method_std, generator=generator)
        if self._granularity > 1:
            weight = weight[:: self._granularity].repeat_interleave(self._granularity, dim=0)
        return weight.to(spec.dtype)

    def _expert(self, name: str, expert: int) -> Tensor:
        """fc1 [2F, D] or [F, D], fc2 [D, F] of one expert; biases alike."""
        dense = self._whole(_dense_name(name))
        pieces, piece = self._granularity, expert % self._granularity
        if "linear_fc1" in name:
            if self.cfg.model.swiglu:  # [2, F, D] -> [gate; up]
                return dense.chunk(pieces, dim=1)[piece].flatten(0, 1)
            return dense.chunk(pieces, dim=0)[piece]
        scale = 1.0 / (self.cfg.moe.moe_router_topk_scaling_factor or 1.0)
        if name.endswith(".bias"):  # added by each expert with weights that sum to one
            return dense if scale == 1.0 else dense * scale
        part = dense.chunk(pieces, dim=1)[piece].contiguous()
        return part if scale * pieces == 1.0 else part * (scale * pieces)

    def _whole(self, name: str) -> Tensor:
        """A tensor of the dense model; the last one is kept, because experts are copies of it."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read
            (rows,) = self._dense.pieces(name)
            self._last = name, self._dense.read(rows)
        return self._last[1]


def _dense_name(name: str) -> str:
    """The tensor that this one is made of, or, of a router, which is new, the first one of the layer that it is put in."""
    if _ROUTER in name:
        return name.partition(_ROUTER)[0] + ".mlp.linear_fc1.weight"
    return name.replace(_EXPERTS, ".mlp.")


def _configure(dense: Source, moe: MoEConfig, granularity: int) -> Config:
    """The dense model's settings with experts. Raises CheckpointError."""
    cfg = copy.deepcopy(dense.cfg)
    if cfg.moe.num_experts is not None:
        raise CheckpointError(
            f"{dense.what} already has {cfg.moe.num_experts} experts: upcycling starts from a dense model"
        )
    if moe.num_experts is None:
        raise CheckpointError("upcycling needs the number of experts: give --num-experts")
    if moe.moe_shared_expert_intermediate_size is not None or moe.moe_router_enable_expert_bias:
        raise CheckpointError(
            "upcycling makes neither a shared expert nor expert biases: drop --moe-shared-expert-intermediate-size and "
            "--moe-router-enable-expert-bias"
        )
    if moe.moe_router_type != "linear":
        raise CheckpointError(f"--moe-router-type ({moe.moe_router_type}) must be linear for upcycling: drop it")
    if granularity < 1:
        raise CheckpointError(f"--moe-upcycling-granularity ({granularity}) must be at least 1: change it")
    width = ModelShape.from_config(cfg.model).ffn
    for what, number in (
        ("the width of the dense layer", width),
        ("--num-experts", moe.num_experts),
        ("--moe-router-topk", moe.moe_router_topk),
    ):
        if number % granularity:
            raise CheckpointError(
                f"{what} ({number}) must be divisible by --moe-upcycling-granularity ({granularity}): change one of them"
            )
    if moe.moe_ffn_hidden_size not in (None, width // granularity):
        raise CheckpointError(
            f"--moe-ffn-hidden-size ({moe.moe_ffn_hidden_size}) must be {width // granularity}, the width of the dense "
            f"layer ({width}) divided by --moe-upcycling-granularity ({granularity}): change it"
        )
    cfg.moe = copy.deepcopy(moe)
    cfg.moe.moe_ffn_hidden_size = width // granularity
    if not any(moe_pattern(cfg)):
        raise CheckpointError(f"--moe-layer-freq ({moe.moe_layer_freq}) makes no layer a mixture of experts: change it")
    refuse_untrainable(cfg, f"{dense.what}, upcycled,")
    return cfg


def _warnings(moe: MoEConfig) -> list[str]:
    normalised = (
        not moe.moe_router_pre_softmax if moe.moe_router_score_function == "softmax" else moe.moe_router_topk > 1
    )
    if normalised:
        return []
    return [
        "the routing weights of a token do not add up to one, so the upcycled model starts as another function than "
        "the dense one: drop --moe-router-pre-softmax (with sigmoid scores: raise --moe-router-topk) to keep it"
    ]


def _token_ids(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key.endswith("_token_id")}
