"""Activation recomputation: which parts of a model forget their activations and compute them again in backward.

Chen et al., arXiv:1604.06174; selective recomputation: Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.config.parallel import RecomputeConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.layer_pass import ReplayMemo

MODULES = ("core_attn", "moe", "mlp", "layernorm")
T = TypeVar("T")
RunLayer = Callable[[int, Tensor, ReplayMemo | None], tuple[Tensor, Tensor]]
"""(number of a layer, activation, memo if it is recomputed as a whole) -> activation, auxiliary loss (fp32 scalar)"""


@dataclass(frozen=True)
class RecomputePlan:
    """What one transformer block recomputes.

    full_layers: the first this many layers keep only their input, per chunk of `chunk` layers.
    modules: what the layers recompute that are not recomputed as a whole. A subset of
        core_attn: the attention proper, between the QKV projection and the output projection;
        mlp, moe: the dense or MoE feed-forward layer with the norm in front of it;
        layernorm: the norm in front of a column-parallel projection, together with that projection's input, which is
        otherwise kept. (The projection itself is not run again. In front of an MoE layer, which keeps permuted rows
        instead of its input, there is nothing to save.)
    """

    full_layers: int = 0
    chunk: int = 1
    modules: frozenset[str] = frozenset()

    @classmethod
    def from_config(cls, cfg: RecomputeConfig, moe: MoEConfig, num_layers: int) -> RecomputePlan:
        """Raises ConfigError for an unknown module or an impossible number of layers."""
        unknown = set(cfg.recompute_modules) - set(MODULES)
        if unknown:
            raise ConfigError(
                f"recompute.recompute_modules ({', '.join(sorted(unknown))}) must be one of {', '.join(MODULES)}: change "
                "--recompute-modules"
            )
        granularity = cfg.recompute_granularity or ("selective" if cfg.recompute_activations else None)
        modules = frozenset(cfg.recompute_modules if granularity == "selective" else ())
        if moe.moe_layer_recompute:
            modules |= {"moe"}
        if granularity != "full":
            return cls(modules=modules)
        layers = 1 if cfg.recompute_num_layers is None else cfg.recompute_num_layers
        if not 1 <= layers <= num_layers:
            raise ConfigError(
                f"recompute.recompute_num_layers ({layers}) must be at least 1 and at most model.num_layers ({num_layers}): "
                "change --recompute-num-layers or --num-layers"
            )
        if cfg.recompute_method == "block":
            return cls(full_layers=layers, modules=modules)
        return cls(full_layers=num_layers, chunk=layers, modules=modules)

    def chunks(self, num_layers: int) -> list[tuple[range, bool]]:
        """Layers that run together, in order, and whether they are recomputed as a whole."""
        full = [
            (range(first, min(first + self.chunk, self.full_layers)), True)
            for first in range(0, self.full_layers, self.chunk)
        ]
        return full + [(range(layer, layer + 1), False) for layer in range(self.full_layers, num_layers)]

    def run(self, layers: Sequence[int], run_layer: RunLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Layers of these numbers, one after the other: the last one's activation, and the sum of the auxiliary losses."""

        def run_some(x: Tensor, some: Sequence[int], memos: dict[int, ReplayMemo]) -> tuple[Tensor, Tensor]:
            total = x.new_zeros((), dtype=torch.float32)
            for layer in some:
                x, aux_loss = run_layer(layer, x, memos.get(layer))
                total = total + aux_loss
            return x, total

        total = x.new_zeros((), dtype=torch.float32)
        for places, full in self.chunks(len(layers)):
            some = layers[places.start : places.stop]
            if full:
                x, aux_loss = recomputed(partial(run_some, some=some, memos={layer: ReplayMemo() for layer in some}), x)
            else:
                x, aux_loss = run_some(x, some, {})
            total = total + aux_loss
        return x, total


def recomputed(function: Callable[..., T], *inputs: Tensor) -> T:
    """Call ``function(*inputs)``, keeping only the inputs; backward calls it again, with the same random numbers.

    The second call stops as soon as it has produced the last tensor that backward needs.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)
