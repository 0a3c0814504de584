"""The experts of this rank: E_l feed-forward networks with one pair of stacked weights.

Shapes: R rows received by this rank, D their width, F width of an expert, E_l local experts.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.ops.groups import why_not_grouped
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import ONE_MATRIX, Init, Matrices, local, parameter

logger = logging.getLogger(__name__)


def activate(hidden: Tensor, model_cfg: ModelConfig) -> Tensor:
    """The non-linearity between fc1 and fc2, on the last dimension.

    SwiGLU takes [..., 2F] laid out as [gate; up] and returns silu(gate) * up of [..., F] (arXiv 2002.05202); GELU, or its
    tanh approximation with ``openai_gelu``, keeps the shape.
    """
    if model_cfg.swiglu:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(hidden, approximate="tanh" if model_cfg.openai_gelu else "none")


def row_width(model_cfg: ModelConfig, moe_cfg: MoEConfig) -> int:
    """Width of the rows that experts get and give: ``moe_latent_size``, else ``hidden_size``."""
    width = moe_cfg.moe_latent_size or model_cfg.hidden_size
    if width is None:
        raise ConfigError("the width of a row is not known: give --hidden-size")
    return width


def expert_width(model_cfg: ModelConfig, moe_cfg: MoEConfig) -> int:
    """F: ``moe_ffn_hidden_size``, else ``ffn_hidden_size``."""
    width = moe_cfg.moe_ffn_hidden_size or model_cfg.ffn_hidden_size
    if width is None:
        raise ConfigError("the width of an expert is not known: give --moe-ffn-hidden-size or --ffn-hidden-size")
    return width


def output_init(model_cfg: ModelConfig) -> Init:
    """Initial values of a layer that writes to the residual stream: std / sqrt(2 * layers) (GPT-2, Megatron)."""
    if not model_cfg.scaled_init:
        return Init("normal", model_cfg.init_method_std)
    return Init("normal", model_cfg.init_method_std / math.sqrt(2 * (model_cfg.num_layers or 1)))


class StackedLinear(nn.Module):
    """Holds ``weight`` [E, out, in] and, with biases, ``bias`` [E, out]; this rank's E_l slices of them."""

    def __init__(
        self,
        num_experts: int,
        width_in: int,
        width_out: int,
        bias: bool,
        init: Init,
        ctx: ParallelContext,
        matrices: Matrices = ONE_MATRIX,
    ):
        super().__init__()
        shape = (num_experts, width_out, width_in)
        self.weight = parameter(shape, ctx, init=init, cut={"ep": 0}, matrices=matrices)
        self.bias = parameter((num_experts, width_out), ctx, init=Init("zeros"), cut={"ep": 0}) if bias else None

    def local(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of this rank's experts."""
        return local(self.weight), None if self.bias is None else local(self.bias)


def _unchanged(x: Tensor) -> Tensor:
    return x


class Feed(NamedTuple):
    """Rows for some or all of this rank's experts. (A tuple, because ``fully_shard`` finds tensors in tuples.)

    Attributes:
        rows: [R, D], sorted by local expert, in the dtype of the weights; or the token of rows under way.
        counts: rows per expert, which sum to R; a list, or an int64 tensor on any device. One on the host avoids a wait
            where the loop runs.
        experts: which of the local experts; None for all.
        arrive: called with ``rows`` when their turn comes; returns the rows.
        then: called with the outputs [R, D] as soon as they are there, so that they can set out while others are computed.
            Returns a tensor of their graph.
    """

    rows: Tensor
    counts: Tensor | Sequence[int]
    experts: range | None = None
    arrive: Callable[[Tensor], Tensor] = _unchanged
    then: Callable[[Tensor], Tensor] = _unchanged


class Experts(nn.Module):
    """``y = fc2_e(activation(fc1_e(x)))`` for the rows of each local expert e.

    Parameters (global shapes; expert-parallel rank r holds experts [r E_l, (r+1) E_l)):
        linear_fc1.weight [E, F, D], or [E, 2F, D] as [gate; up] with SwiGLU; linear_fc1.bias [E, F or 2F]
        linear_fc2.weight [E, D, F]; linear_fc2.bias [E, D]
    """

    expert_fsdp_unit = True

    def __init__(
        self, model_cfg: ModelConfig, moe_cfg: MoEConfig, ctx: ParallelContext, gemm: str | None = None
    ) -> None:
        """
        Args:
            gemm: ``"loop"`` or ``"grouped"`` forces one implementation (for tests and benchmarks); None chooses by
                :func:`why_not_grouped`.
        """
        super().__init__()
        if moe_cfg.num_experts is None:
            raise ConfigError("experts need --num-experts")
        if gemm not in (None, "loop", "grouped"):
            raise ValueError(f"gemm {gemm!r} is not one of None, 'loop', 'grouped'")
        hidden, width, bias = row_width(model_cfg, moe_cfg), expert_width(model_cfg, moe_cfg), model_cfg.add_bias_linear
        self._model_cfg, self._gemm = model_cfg, gemm
        width_fc1 = 2 * width if model_cfg.swiglu else width
        init = Init("normal", model_cfg.init_method_std)
        gate_and_up = Matrices((width, width)) if model_cfg.swiglu else ONE_MATRIX
        self.linear_fc1 = StackedLinear(moe_cfg.num_experts, hidden, width_fc1, bias, init, ctx, gate_and_up)
        bias &= model_cfg.add_bias_fc2
        self.linear_fc2 = StackedLinear(moe_cfg.num_experts, width, hidden, bias, output_init(model_cfg), ctx)
        self._dropout = moe_cfg.moe_expert_dropout

    def forward(self, *feeds: Feed) -> Any:
        """Apply each expert to its rows.

        Args:
            feeds: the rows, in one piece or in several that cover the local experts. All in one call, also where the pieces
                arrive one after the other: this module is a unit of ``fully_shard``, and each call of one is a round of
                gathering parameters and reducing gradients.

        Returns:
            What each feed's ``then`` makes of its outputs [R, D]; by itself if there is one feed, else a tuple. Every
            parameter takes part in the graph, also with R = 0, so that hooks of the backward pass run on every rank.
        """
        fc1, fc2 = self.linear_fc1.local(), self.linear_fc2.local()
        results = [feed.then(self._run(feed, fc1, fc2)) for feed in feeds]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, feed: Feed, fc1: tuple[Tensor, Tensor | None], fc2: tuple[Tensor, Tensor | None]) -> Tensor:
        rows_RD, counts = feed.arrive(feed.rows), feed.counts
        if feed.experts is not None:
            first, last = feed.experts.start, feed.experts.stop
            fc1, fc2 = ((w[first:last], None if b is None else b[first:last]) for w, b in (fc1, fc2))
        if len(counts) != fc1[0].shape[0]:
            raise ValueError(f"{len(counts)} counts for {fc1[0].shape[0]} local experts")
        gemm = self._gemm
        if gemm is None:
            reason = why_not_grouped(rows_RD.dtype, rows_RD.device, (*fc1[0].shape[1:], *fc2[0].shape[1:]))
            gemm = "loop" if reason else "grouped"
            if reason:
                _announce(reason, logging.WARNING if rows_RD.device.type == "cuda" else logging.INFO)
        # Nothing to multiply: the loop costs nothing then, and asks nothing of grouped_mm's corner cases.
        if gemm == "loop" or rows_RD.shape[0] == 0:
            return self._loop(rows_RD, counts, fc1, fc2)
        return self._grouped(rows_RD, counts, fc1, fc2)

    def _loop(
        self,
        rows_RD: Tensor,
        counts: Tensor | Sequence[int],
        fc1: tuple[Tensor, Tensor | None],
        fc2: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        if sum(sizes) != rows_RD.shape[0]:
            raise ValueError(f"counts sum to {sum(sizes)}, but there are {rows_RD.shape[0]} rows")
        outputs = []
        biases1 = fc1[1] if fc1[1] is not None else itertools.repeat(None)
        biases2 = fc2[1] if fc2[1] is not None else itertools.repeat(None)
        for rows, w1, b1, w2, b2 in zip(rows_RD.split(sizes), fc1[0], biases1, fc2[0], biases2, strict=False):
            outputs.append(F.linear(self._activate(F.linear(rows, w1, b1)), w2, b2))
        return torch.cat(outputs)

    def _grouped(
        self,
        rows_RD: Tensor,
        counts: Tensor | Sequence[int],
        fc1: tuple[Tensor, Tensor | None],
        fc2: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        if not isinstance(counts, Tensor):
            counts = torch.tensor(counts)
        ends_E = counts.cumsum(0).to(torch.int32)
        if rows_RD.is_cuda and not ends_E.is_cuda:
            ends_E = ends_E.pin_memory()  # out of other memory a copy waits
        ends_E = ends_E.to(rows_RD.device, non_blocking=True)
        expert_R = None
        if fc1[1] is not None or fc2[1] is not None:
            row_R = torch.arange(rows_RD.shape[0], device=rows_RD.device, dtype=torch.int32)
            expert_R = torch.searchsorted(ends_E, row_R, right=True)
        hidden = self._activate(_grouped_linear(rows_RD, *fc1, ends_E, expert_R))
        return _grouped_linear(hidden, *fc2, ends_E, expert_R)

    def _activate(self, hidden: Tensor) -> Tensor:
        hidden = activate(hidden, self._model_cfg)
        return F.dropout(hidden, self._dropout, self.training) if self._dropout else hidden


def _grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, ends_E: Tensor, expert_R: Tensor | None
) -> Tensor:
    """One linear layer per expert on its rows; ``ends_E`` int32 are the ends of the experts' rows."""
    y_RO = F.grouped_mm(x_RI.contiguous(), weight_EOI.transpose(1, 2), offs=ends_E)
    if y_RO.requires_grad:
        y_RO.register_hook(_contiguous)
    return y_RO if bias_EO is None else y_RO + bias_EO[expert_R]


def _contiguous(grad: Tensor) -> Tensor:
    """grouped_mm's backward wants real strides; gradients of sums come expanded with stride 0."""
    return grad.contiguous()


@functools.cache  # once per process and reason, not once per layer
def _announce(reason: str, level: int) -> None:
    logger.log(level, "experts run one after the other, without a grouped GEMM: %s", reason)
