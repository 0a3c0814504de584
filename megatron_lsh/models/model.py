"""What the train loop asks of every model, whatever it is made of."""

from __future__ import annotations

from torch import nn

from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.router import update_expert_biases
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext


class Model(nn.Module):
    """The base of all models.

    Args:
        ctx: groups and device; parameters are this rank's shards.
        telemetry: receives the gauges of the MoE layers.
    """

    def __init__(self, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        super().__init__()
        self.ctx = ctx
        self.telemetry = telemetry

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
