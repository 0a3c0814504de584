"""The MoE layer: route each token, dispatch it to its experts and back, add the shared expert.

docs/architecture.md follows one token through this file and those below it.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.moe.experts import Experts, output_init
from megatron_lsh.moe.gauges import Gauge, max_over_mean, of_load, per_micro_batch, quantile
from megatron_lsh.moe.latent import ReplicatedLinear
from megatron_lsh.moe.layer_pass import Deferred, LayerPass, Noise, ReplayMemo
from megatron_lsh.moe.registry import GAUGES as DISPATCHER_GAUGES
from megatron_lsh.moe.registry import DispatcherSpec, build_dispatcher
from megatron_lsh.moe.router import Routing, TopKRouter
from megatron_lsh.moe.shared_experts import SharedExperts
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init
from megatron_lsh.parallel.random import derive_seed

GAUGES = (
    Gauge("load_balancing_loss", "loss", "load-balancing loss", per_micro_batch("load_balancing_loss"),
          "without its coefficient; 1 is perfect balance", layers="mean"),
    Gauge("z_loss", "loss", "router z-loss", per_micro_batch("z_loss"), "without its coefficient", layers="mean"),
    Gauge("load_max_over_mean", "", "fullest expert / mean", of_load(max_over_mean),
          "rows of the fullest expert over the mean", layers="mean", model_name="expert_load_max_over_mean"),
    Gauge("load_p50", "rows", "rows per expert, median", of_load(quantile(0.5), per_iteration=True),
          "median of the rows per expert", layers=None),
    Gauge("load_p95", "rows", "rows per expert, 95th percentile", of_load(quantile(0.95), per_iteration=True),
          "95th percentile of the rows per expert", layers=None),
    *DISPATCHER_GAUGES,
)  # fmt: skip


def declare_gauges(
    model_cfg: ModelConfig, moe_cfg: MoEConfig, lsh_cfg: LSHConfig, ctx: ParallelContext, telemetry: MoETelemetry
) -> None:
    """What the MoE layers of other pipeline stages measure, for a rank that has none and reports of them all the same."""
    dispatcher = build_dispatcher(DispatcherSpec.of(model_cfg, moe_cfg, lsh_cfg, ctx, layer=0))
    telemetry.declare((*GAUGES, *dispatcher.gauges))


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
        self.layer, self._rank = layer, ctx.rank
        self._noise = Noise(0)
        self.router = TopKRouter(model_cfg, moe_cfg, ctx)
        self.experts = Experts(model_cfg, moe_cfg, ctx)
        self.shared_experts = (
            SharedExperts(model_cfg, moe_cfg, ctx) if moe_cfg.moe_shared_expert_intermediate_size else None
        )
        self._shared_first = moe_cfg.moe_shared_expert_overlap and self.shared_experts is not None
        self.fc1_latent_proj: ReplicatedLinear | None = None
        self.fc2_latent_proj: ReplicatedLinear | None = None
        if moe_cfg.moe_latent_size is not None:
            hidden, width, bias = model_cfg.hidden_size, moe_cfg.moe_latent_size, model_cfg.add_bias_linear
            init = Init("normal", model_cfg.init_method_std)
            self.fc1_latent_proj = ReplicatedLinear(hidden, width, ctx, init=init, bias=bias)
            self.fc2_latent_proj = ReplicatedLinear(width, hidden, ctx, init=output_init(model_cfg), bias=bias)
        self.dispatcher = build_dispatcher(DispatcherSpec.of(model_cfg, moe_cfg, lsh_cfg, ctx, layer))
        self._record = telemetry.layer(layer, moe_cfg.num_experts, (*GAUGES, *self.dispatcher.gauges))

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        """Say how many iterations are complete, and how many there will be; called before each one."""
        self.dispatcher.set_iteration(iteration, total)
        # A rank has its own: errors of rounding that are alike on all of them do not average out in a gradient.
        self._noise = Noise(derive_seed("rounding", iteration, self.layer, self._rank))

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
        p = LayerPass(self._record, memo, self._noise)
        x_TD = x_SBD.flatten(0, 1)
        routing = self.router(
            x_TD, None if token_mask_SB is None else token_mask_SB.flatten(), x_SBD.shape[1], p.decided
        )
        if not p.replay:
            losses = {"load_balancing_loss": routing.load_balancing_loss, "z_loss": routing.z_loss}
            p.add_load(routing.tokens_per_expert_E, **losses)
        shared = self._shared_output(x_SBD, p) if self._shared_first else None
        y_TD = self._through_experts(x_TD, routing, p)
        if self.shared_experts is not None:
            shared = shared or self._shared_output(x_SBD, p)
            y_TD = y_TD + shared().flatten(0, 1)
        return y_TD.view_as(x_SBD), routing.aux_loss

    def _through_experts(self, x_TD: Tensor, routing: Routing, p: LayerPass) -> Tensor:
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return self.dispatcher(x_TD, routing, self.experts, p)
        y_TL = self.dispatcher(self.fc1_latent_proj(x_TD), routing, self.experts, p)
        return self.fc2_latent_proj(y_TL)

    def _shared_output(self, x_SBD: Tensor, p: LayerPass) -> Deferred[Tensor]:
        """Of the shared expert: computed while the dispatcher's rows travel, or when it is asked for."""
        shared_experts = self.shared_experts
        assert shared_experts is not None
        return p.defer(lambda: shared_experts(x_SBD))
