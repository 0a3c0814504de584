"""The MoE layer: route, permute, compress, exchange, run experts, exchange back, restore, weigh.

docs/architecture.md follows one token through this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.moe.compressor import NoCompressor
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.memo import ReplayMemo
from megatron_lsh.moe.permute import permute, unpermute
from megatron_lsh.moe.registry import DispatcherSpec, resolve_dispatcher
from megatron_lsh.moe.router import Routing, TopKRouter
from megatron_lsh.moe.shared_experts import SharedExperts
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext


class MoELayer(nn.Module):
    """A feed-forward layer whose E experts are spread over the expert-parallel ranks."""

    def __init__(
        self,
        model_cfg: ModelConfig,
        moe_cfg: MoEConfig,
        lsh_cfg: LSHConfig,
        ctx: ParallelContext,
        layer: int,
        telemetry: MoETelemetry,
    ) -> None:
        """
        Args:
            layer: number of this layer in the model, from 0; seeds its hashes and labels its gauges.
            telemetry: gauges shared by all layers of the model.

        Raises:
            ConfigError: an unknown ``--moe-token-dispatcher-type``.
        """
        super().__init__()
        assert moe_cfg.num_experts is not None and model_cfg.hidden_size is not None  # checked by validate()
        self._lsh_warmup = lsh_cfg.lsh_warmup_iters
        self._layer = layer
        self._num_experts = moe_cfg.num_experts
        self._telemetry = telemetry
        self._warming_up = self._lsh_warmup > 0
        self._exact = False
        self.router = TopKRouter(model_cfg, moe_cfg, ctx)
        self.experts = Experts(model_cfg, moe_cfg, ctx)
        self.shared_experts = (
            SharedExperts(model_cfg, moe_cfg, ctx) if moe_cfg.moe_shared_expert_intermediate_size else None
        )
        dispatcher = resolve_dispatcher(moe_cfg.moe_token_dispatcher_type)(
            DispatcherSpec(moe_cfg, lsh_cfg, ctx, model_cfg.hidden_size, moe_cfg.num_experts, layer, telemetry)
        )
        self.exchange = dispatcher.exchange
        self.compressor = dispatcher.compressor

    def set_iteration(self, iteration: int) -> None:
        """Tell the schedules how many iterations are complete; called before each one."""
        self._warming_up = iteration < self._lsh_warmup

    def forward(
        self, x_SBD: Tensor, token_mask_SB: Tensor | None = None, memo: ReplayMemo | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run each token through its top-k experts.

        Args:
            x_SBD: this rank's tokens (its sequence shard under sequence parallelism).
            token_mask_SB: bool, False for padding, which is neither routed nor counted; None means all True.
            memo: the transformer layer's record for activation recomputation.

        Returns:
            y_SBD in the dtype of x, and the auxiliary loss (fp32 scalar, already weighted; this rank's share).
        """
        memo = memo or ReplayMemo()
        replaying = memo.replaying((self._layer, "moe"))
        x_TD = x_SBD.flatten(0, 1)
        mask_T = None if token_mask_SB is None else token_mask_SB.flatten()
        routing = self.router(x_TD, mask_T, x_SBD.shape[1], memo)
        y_TD = self._run_experts(x_TD, routing, memo, count=not replaying)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_SBD).flatten(0, 1)
        if not replaying:
            self._telemetry.add(self._layer, "load_balancing_loss", routing.load_balancing_loss)
            self._telemetry.add(self._layer, "z_loss", routing.z_loss)
        return y_TD.view_as(x_SBD), routing.aux_loss

    def _run_experts(self, x_TD: Tensor, routing: Routing, memo: ReplayMemo, count: bool) -> Tensor:
        compressor = NoCompressor() if self._exact or self._warming_up else self.compressor
        rows_ND, counts_E, permutation = permute(
            x_TD, routing.expert_ids_TK, self._num_experts, num_rows=routing.num_rows()
        )
        if count:
            self._telemetry.add_load(self._layer, counts_E)
        wire_CD, wire_counts_E, state = compressor.compress(rows_ND, counts_E, memo)
        received_RD, local_counts, handle = self.exchange.dispatch(wire_CD, wire_counts_E, counts_E)
        out_RD = self.experts(received_RD, local_counts)
        back_CD = self.exchange.combine(out_RD, handle)
        rows_out_ND = compressor.restore(back_CD, state)
        # Weights are applied at the source: one centroid stands for rows with different weights.
        return unpermute(rows_out_ND, routing.probs_TK, permutation)


@contextmanager
def exact_dispatch(model: nn.Module) -> Iterator[None]:
    """Within this context every MoE layer of ``model`` runs uncompressed (generation, exact evaluation)."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    before = [layer._exact for layer in layers]
    for layer in layers:
        layer._exact = True
    try:
        yield
    finally:
        for layer, exact in zip(layers, before, strict=True):
            layer._exact = exact
