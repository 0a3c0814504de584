"""The MoE layer: route, permute, compress, exchange, run experts, exchange back, restore, weigh.

docs/architecture.md follows one token through this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.lsh import straight_through
from megatron_lsh.moe.compressor import Compressor, LSHCompressor, NoCompressor
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.memo import ReplayMemo
from megatron_lsh.moe.permute import permute, sort_by_expert, unpermute
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
        self._lsh_cfg = lsh_cfg
        self._shortcut = moe_cfg.moe_gradient_shortcut
        self._layer = layer
        self._num_experts = moe_cfg.num_experts
        self._telemetry = telemetry
        self._iteration = 0
        self._scheduled_exact = self._exact_at(0, None)
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
        self.trial = dispatcher.trial

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        """Tell the schedules how many iterations are complete, and how many there will be; called before each one."""
        self._iteration = iteration
        self._scheduled_exact = self._exact_at(iteration, total)
        if self.trial is not None:
            self.trial.begin(iteration, paused=self._scheduled_exact)
        self.exchange.reseed((iteration * 1_000_003 + self._layer) % (1 << 62))

    def _exact_at(self, iteration: int, total: int | None) -> bool:
        cfg = self._lsh_cfg
        annealing = total is not None and iteration >= total - cfg.lsh_anneal_iters
        return iteration < cfg.lsh_warmup_iters or annealing or self._layer < cfg.lsh_start_layer

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
        exact = self._exact or self._scheduled_exact or (self.trial is not None and self.trial.exact)
        compressor = NoCompressor() if exact else self.compressor
        probe = count and not exact and self._probe_due()
        with nullcontext() if self.trial is None or not self.training else self.trial.timed() as region:
            x_TD = x_TD if region is None else region.enter(x_TD)
            if (
                isinstance(compressor, LSHCompressor)
                and compressor.reads_tokens(x_TD, routing.probs_TK)
                and not (probe or self._shortcut)
            ):
                y_TD, counts_E = self._tokens_through_experts(x_TD, routing, compressor, memo)
            else:
                rows_ND, counts_E, permutation = permute(
                    x_TD, routing.expert_ids_TK, self._num_experts, num_rows=routing.num_rows()
                )
                restored_ND = rows_out_ND = self._rows_through_experts(rows_ND, counts_E, compressor, memo)
                if self._shortcut:
                    rows_out_ND = straight_through(rows_out_ND, rows_ND)
                # Weights are applied at the source: one centroid stands for rows with different weights.
                y_TD = unpermute(rows_out_ND, routing.probs_TK, permutation)
            y_TD = y_TD if region is None else region.leave(y_TD)
        if count:
            self._telemetry.add_load(self._layer, counts_E)
        if probe:
            self._probe(rows_ND, counts_E, restored_ND)
        return y_TD

    def _tokens_through_experts(
        self, x_TD: Tensor, routing: Routing, compressor: LSHCompressor, memo: ReplayMemo | None
    ) -> tuple[Tensor, Tensor]:
        """What permute, :meth:`_rows_through_experts` and unpermute compute, by kernels that need no rows in memory.

        Returns:
            y_TD, and the rows per expert.
        """
        permutation = sort_by_expert(routing.expert_ids_TK, self._num_experts, routing.num_rows())
        wire_CD, wire_counts_E, state = compressor.compress_tokens(x_TD, permutation, memo)
        back_CD = self._wire_through_experts(wire_CD, wire_counts_E, permutation.counts_E)
        return compressor.restore_tokens(back_CD, routing.probs_TK, state), permutation.counts_E

    def _rows_through_experts(
        self, rows_ND: Tensor, counts_E: Tensor, compressor: Compressor, memo: ReplayMemo | None
    ) -> Tensor:
        """Rows sorted by expert -> their experts' outputs, wherever those experts are."""
        wire_CD, wire_counts_E, state = compressor.compress(rows_ND, counts_E, memo)
        return compressor.restore(self._wire_through_experts(wire_CD, wire_counts_E, counts_E), state)

    def _wire_through_experts(self, wire_CD: Tensor, wire_counts_E: Tensor, counts_E: Tensor) -> Tensor:
        """Send wire rows to their experts, run those, and take the outputs back."""
        received_RD, local_counts, handle = self.exchange.dispatch(wire_CD, wire_counts_E, counts_E)
        with self._telemetry.timed(self._layer, "experts_time_ms") as region:
            out_RD = region.leave(self.experts(region.enter(received_RD), local_counts))
        return self.exchange.combine(out_RD, handle)

    def _probe_due(self) -> bool:
        interval = self._lsh_cfg.lsh_probe_interval
        return interval is not None and self.training and self._iteration % interval == 0

    @torch.no_grad()
    def _probe(self, rows_ND: Tensor, counts_E: Tensor, restored_ND: Tensor) -> None:
        """Measure what compression did to the experts' outputs, by running the exact ones once more."""
        with self._telemetry.paused(), self.exchange.lossless():
            exact_ND = self._rows_through_experts(rows_ND, counts_E, NoCompressor(), None)
        error, total = ((t.float().square().sum()) for t in (restored_ND - exact_ND, exact_ND))
        self._telemetry.add(self._layer, "probe_error_energy", error)
        self._telemetry.add(self._layer, "probe_output_energy", total)


@contextmanager
def exact_dispatch(model: nn.Module) -> Iterator[None]:
    """Within this context every MoE layer of ``model`` runs as an exported model does: every row travels, in the numbers
    it has (generation, exact evaluation)."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    before = [layer._exact for layer in layers]
    with ExitStack() as stack:
        for layer in layers:
            layer._exact = True
            stack.enter_context(layer.exchange.lossless())
        try:
            yield
        finally:
            for layer, exact in zip(layers, before, strict=True):
                layer._exact = exact
