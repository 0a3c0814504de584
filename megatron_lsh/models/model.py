"""What the train loop asks of every model, whatever it is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from megatron_lsh.config.pipeline import Chunk
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.router import update_expert_biases
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext


class StagePass(NamedTuple):
    """Which part of a model a pipeline stage runs, and on what."""

    chunk: int = 0
    """number among the chunks that this rank holds"""
    arrived_sBD: Tensor | None = None
    """the previous chunk's output; None for the first one"""


WHOLE = StagePass()


class Model(nn.Module):
    """The base of all models.

    A model that pipeline stages can run takes a ``StagePass`` as keyword argument ``stage``. A chunk that is not the last
    returns what the last one returns, with zeros in place of losses and logits, and its hidden states [s, B, D] after it.

    Args:
        ctx: groups and device; parameters are this rank's shards.
        telemetry: receives the gauges of the MoE layers.
    """

    def __init__(self, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__()
        self.ctx = ctx
        self.telemetry = telemetry
        self.chunks = [Chunk(range(0))]
        """what this rank runs, in order; a subclass that pipeline stages can run sets it"""

    def tied_parameters(self) -> list[Tensor]:
        """Parameters that the first and the last pipeline stage both hold; their gradients belong together."""
        return []

    def moe_layers(self) -> list[MoELayer]:
        """The mixture-of-experts layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        """Tell the MoE layers which iteration begins (0-based), and of how many; the LSH schedules count them."""
        for layer in self.moe_layers():
            layer.set_iteration(iteration, total)

    def update_expert_bias(self) -> None:
        """After an optimizer step: move the balancing biases of the routers by the load since the last call."""
        update_expert_biases([layer.router for layer in self.moe_layers()], self.ctx)

    def discard_expert_load(self) -> None:
        """After a skipped optimizer step: forget the load of its micro-batches."""
        for layer in self.moe_layers():
            layer.router.discard_counts()
