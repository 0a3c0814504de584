"""Top-k router: which experts each token visits, and with what weight.

Shapes: T tokens on this rank (S * B, the batch index varies fastest), D features, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.balancing import (
    LoadShare,
    count_experts,
    load_balancing_loss,
    load_importance_loss,
    load_share,
    sum_over,
    z_loss,
)
from megatron_lsh.moe.capacity import expert_capacity, within_capacity
from megatron_lsh.moe.cosine_gate import CosineGate
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.parameters import Init, local, parameter


@dataclass(frozen=True)
class Routing:
    """What the router decided for one micro-batch on one rank.

    Attributes:
        expert_ids_TK: int64 [T, K]; -1 where the token is masked or the choice was dropped.
        probs_TK: fp32 [T, K] weights of the experts' outputs, 0 where the id is -1 (fp64 if the input is fp64).
        aux_loss: fp32 scalar to add to this micro-batch's loss, coefficients applied. With sequence parallelism it is
            this rank's part: the parts of a tensor-parallel group add up to the loss of the micro-batch.
        load_balancing_loss: detached scalar without its coefficient. Summed over tensor-parallel ranks and averaged over
            data-parallel ranks and micro-batches it is the value Megatron logs; 1 is perfect balance.
        z_loss: the same for the z-loss.
        tokens_per_expert_E: int64 [E], rows of this rank per expert, as in ``expert_ids_TK``.
        complete: no token is masked and no choice can be dropped, so there are exactly T * K rows.
    """

    expert_ids_TK: Tensor
    probs_TK: Tensor
    aux_loss: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor
    tokens_per_expert_E: Tensor
    complete: bool

    def num_rows(self) -> int:
        """Rows of this rank. Waits for the device unless the routing is ``complete``."""
        return self.expert_ids_TK.numel() if self.complete else int(self.tokens_per_expert_E.sum())


@dataclass(frozen=True)
class _Selection:
    """The discrete half of a routing; recorded once and repeated under recomputation."""

    chosen_TK: Tensor  # int64, an expert for every choice, masked tokens included
    keep_TK: Tensor | None  # bool; None keeps every choice
    share: LoadShare | None


class TopKRouter(nn.Module):
    """Linear router with top-k selection.

    Weights follow Megatron's ``topk_routing_with_score_function``, for logits l of one token and its K chosen experts:

        softmax                  p = softmax of the K chosen logits
        softmax, pre-softmax     p = softmax of all E logits, at the chosen ones; not renormalised
        sigmoid                  s = sigmoid(l); p = s / sum of the K chosen s if K > 1, else s

    times ``moe_router_topk_scaling_factor``. Of equal scores the expert with the lowest id wins.

    Routing limited to groups (``moe_router_num_groups``, ``moe_router_group_topk``): each token chooses among the experts of
    its best groups only; see :func:`group_limited_ids`. Sinkhorn (``moe_router_load_balancing_type``): in training a
    transport plan chooses instead of the scores; see :func:`sinkhorn_plan`. The weights are those above, without
    renormalising (``derive.py`` sets sigmoid for K = 1, else softmax before the top-k).

    Balancing without a loss (arXiv 2408.15664): experts are selected by s + bias, weighted by s. After each optimizer
    step :meth:`update_bias` moves every bias by a fixed rate towards balance.

    With ``moe_router_gate_noise`` a noise of standard deviation noise / E is added to the logits in training, from which
    choices, weights and losses follow (the load-importance loss needs both, with and without noise), as in Tutel.

    State: ``weight`` [E, D] (or ``gate``, see :class:`CosineGate`); ``bias`` [E], added to the logits, where linear layers
    have biases (as in megatron-core since 0.15); with ``moe_router_enable_expert_bias`` the buffer ``expert_bias`` fp32
    [E], saved with the model. Counters are not saved; they are empty between optimizer steps.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    gate: CosineGate | None
    expert_bias: Tensor | None
    _step_counts_E: Tensor
    _global_counts_E: Tensor

    def __init__(self, model_cfg: ModelConfig, moe_cfg: MoEConfig, ctx: ParallelContext) -> None:
        super().__init__()
        self._cfg = moe_cfg
        self._tokens, self._dp = ctx.tokens, ctx.dp
        self._split_tokens = ctx.sequence_parallel
        self._num_experts, hidden = _checked_sizes(model_cfg, moe_cfg)
        if ctx.tp.process_group is not None and ctx.tp.size > 1 and not ctx.sequence_parallel:
            raise ValueError("a router on several tensor-parallel ranks needs sequence parallelism")
        self._dtype = torch.float64 if moe_cfg.moe_router_dtype == "fp64" else torch.float32
        init = Init("normal", model_cfg.init_method_std)
        self.gate = self.bias = None
        if moe_cfg.moe_router_type == "cosine":
            self.gate = CosineGate(hidden, self._num_experts, ctx, init)
        else:
            self.weight = parameter((self._num_experts, hidden), ctx, init=init)
            # Megatron-LM draws the bias like the weight instead of starting it at zero.
            biased = model_cfg.add_bias_linear and moe_cfg.moe_router_bias
            self.bias = parameter((self._num_experts,), ctx, init=init) if biased else None

        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.zeros(self._num_experts, dtype=dtype, device=ctx.device)

        self.register_buffer("expert_bias", buffer(torch.float32) if moe_cfg.moe_router_enable_expert_bias else None)
        self.register_buffer("_step_counts_E", buffer(torch.int64), persistent=False)
        self.register_buffer("_global_counts_E", buffer(torch.int64), persistent=False)

    def forward(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None = None,
        batch_size: int = 1,
        memo: ReplayMemo | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x_TD: any floating dtype; logits, scores and losses are computed in ``moe_router_dtype`` (or in the input's
                dtype where that is wider).
            token_mask_T: bool, False for padding, which is sent nowhere and counted nowhere. None: all tokens count.
            batch_size: B, sequences among the T tokens (for seq_aux_loss).
            memo: required under activation recomputation, so that the replay repeats every choice and counts nothing
                a second time.
        """
        memo = ReplayMemo() if memo is None else memo
        # Random numbers are drawn in a replay too: the generator must advance as it did the first time.
        random = self._draw(x_TD.shape[0], x_TD.device) if self._cfg.moe_router_force_load_balancing else None
        clean_TE = self._logits(x_TD)
        logits_TE = self._noisy(clean_TE)
        learning = self.training and torch.is_grad_enabled()
        if self not in memo:
            memo[self] = self._select(logits_TE.detach(), token_mask_T, batch_size, random, learning)
        selection: _Selection = memo[self]

        ids_TK, keep_TK = selection.chosen_TK, selection.keep_TK
        probs_TK = self._weights(logits_TE, ids_TK).to(torch.promote_types(torch.float32, x_TD.dtype))
        if keep_TK is not None:
            ids_TK, probs_TK = ids_TK.masked_fill(~keep_TK, -1), probs_TK.masked_fill(~keep_TK, 0)
        balancing, z = self._losses(logits_TE, clean_TE, selection.chosen_TK, token_mask_T, selection.share)
        cfg = self._cfg
        return Routing(
            expert_ids_TK=ids_TK,
            probs_TK=probs_TK,
            aux_loss=(balancing * cfg.moe_aux_loss_coeff + z * (cfg.moe_z_loss_coeff or 0.0)).to(probs_TK.dtype),
            load_balancing_loss=balancing.detach(),
            z_loss=z.detach(),
            tokens_per_expert_E=count_experts(ids_TK, self._num_experts)[0],
            complete=keep_TK is None,
        )

    def update_bias(self, ctx: ParallelContext) -> None:
        """Close an optimizer step that was taken. Collective over the pipeline stage; see :func:`update_expert_biases`."""
        update_expert_biases([self], ctx)

    @torch.no_grad()
    def discard_counts(self) -> None:
        """Close an optimizer step that was skipped: forget what its micro-batches counted."""
        self._step_counts_E.zero_()
        self._global_counts_E.zero_()

    def extra_repr(self) -> str:
        return f"experts={self._num_experts}, topk={self._cfg.moe_router_topk}"

    def _logits(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(self._dtype, x_TD.dtype)
        eps = self._cfg.moe_input_jitter_eps
        if eps and self.training:
            # In the router's precision: bf16 has only a handful of values within 1 +- 0.01.
            x_TD = x_TD.to(dtype)
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)
        partial = self._split_tokens
        if self.gate is not None:
            logits_TE: Tensor = self.gate(x_TD, dtype, partial)
            return logits_TE
        bias_E = None if self.bias is None else local(self.bias, partial_grad=partial)
        return _RouterLinear.apply(x_TD, local(self.weight, partial_grad=partial), bias_E, dtype)

    def _noisy(self, logits_TE: Tensor) -> Tensor:
        """With --moe-router-gate-noise, in training. Drawn in a replay too, see ``forward``."""
        noise = self._cfg.moe_router_gate_noise
        if not noise or not self.training:
            return logits_TE
        return logits_TE + torch.randn_like(logits_TE) * (noise / self._num_experts)

    def _draw(self, num_tokens: int, device: torch.device) -> Tensor:
        return torch.rand(num_tokens + self._num_experts, device=device)

    @torch.no_grad()
    def _select(
        self,
        logits_TE: Tensor,
        token_mask_T: Tensor | None,
        batch_size: int,
        random: Tensor | None,
        learning: bool,
    ) -> _Selection:
        cfg, num_experts, topk = self._cfg, self._num_experts, self._cfg.moe_router_topk
        if random is not None:
            chosen_TK = preferred_TK = balanced_ids(random, logits_TE.shape[0], topk, num_experts, token_mask_T)
        elif cfg.moe_router_load_balancing_type == "sinkhorn" and self.training:
            chosen_TK = preferred_TK = top_ids(sinkhorn_plan(logits_TE, token_mask_T), topk)
        else:
            preferred_TK = top_ids(logits_TE, topk)
            chosen_TK = self._chosen(logits_TE, preferred_TK)

        ids_TK, keep_TK = chosen_TK, None
        if token_mask_T is not None:
            keep_TK = token_mask_T[:, None].expand(-1, topk)
            ids_TK, preferred_TK = chosen_TK.masked_fill(~keep_TK, -1), preferred_TK.masked_fill(~keep_TK, -1)
        share = None
        if learning:
            if self.expert_bias is not None:
                self._step_counts_E += count_experts(ids_TK, num_experts)[0]
            if self._balances() or cfg.moe_z_loss_coeff:
                # As in Megatron the loss judges the choice without bias and groups.
                kind = cfg.moe_router_load_balancing_type
                share = load_share(
                    preferred_TK, num_experts, kind, batch_size, self._tokens, self._dp, self._global_counts_E
                )
        if cfg.moe_expert_capacity_factor is not None and (self.training or cfg.eval_capacity):
            factor, policy = cfg.moe_expert_capacity_factor, cfg.moe_token_drop_policy
            tokens = logits_TE.shape[0] if token_mask_T is None else token_mask_T.sum()
            capacity = expert_capacity(tokens, topk, num_experts, factor, cfg.moe_capacity_rounding)
            probs_TK = self._weights(logits_TE, chosen_TK)
            best_T = self._all_scores(logits_TE).amax(-1) if policy == "batch-priority" else None
            keep_TK = within_capacity(ids_TK, probs_TK, num_experts, capacity, policy, best_T)
        return _Selection(chosen_TK, keep_TK, share)

    def _chosen(self, logits_TE: Tensor, preferred_TK: Tensor) -> Tensor:
        """The K experts of each token, given those with the largest logits: bias and groups may decide otherwise."""
        cfg = self._cfg
        groups, group_topk = cfg.moe_router_num_groups, cfg.moe_router_group_topk
        if self.expert_bias is None and group_topk is None:
            return preferred_TK  # scores grow with the logits
        scores_TE = logits_TE
        if cfg.moe_router_score_function == "sigmoid":
            scores_TE = torch.sigmoid(logits_TE)
        elif cfg.moe_router_pre_softmax:
            scores_TE = torch.softmax(logits_TE, -1)
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias.to(scores_TE.dtype)
        if groups is None or group_topk is None:
            return top_ids(scores_TE, cfg.moe_router_topk)
        return group_limited_ids(scores_TE, cfg.moe_router_topk, groups, group_topk)

    def _balances(self) -> bool:
        return self._cfg.moe_router_load_balancing_type != "none" and self._cfg.moe_aux_loss_coeff != 0

    def _weights(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        cfg = self._cfg
        if cfg.moe_router_score_function == "sigmoid":
            probs_TK = torch.sigmoid(logits_TE.gather(1, ids_TK))
            if ids_TK.shape[1] > 1:
                probs_TK = probs_TK / (probs_TK.sum(-1, keepdim=True) + 1e-20)
        elif cfg.moe_router_pre_softmax:
            probs_TK = torch.softmax(logits_TE, -1).gather(1, ids_TK)
        else:
            probs_TK = torch.softmax(logits_TE.gather(1, ids_TK), -1)
        return probs_TK * cfg.moe_router_topk_scaling_factor if cfg.moe_router_topk_scaling_factor else probs_TK

    def _losses(
        self,
        logits_TE: Tensor,
        clean_TE: Tensor,
        chosen_TK: Tensor,
        token_mask_T: Tensor | None,
        share: LoadShare | None,
    ) -> tuple[Tensor, Tensor]:
        """Unscaled (load-balancing loss, z-loss); zero where not wanted. `clean_TE`: the logits without noise."""
        balancing = z = logits_TE.new_zeros(())
        if share is not None and self._cfg.moe_router_load_balancing_type == "load_importance":
            scores_TE, threshold_T = self._all_scores(clean_TE), logits_TE.gather(1, chosen_TK[:, -1:]).squeeze(1)
            balancing = load_importance_loss(scores_TE, threshold_T, self._cfg.moe_router_gate_noise, token_mask_T)
        elif share is not None and self._balances():
            scores_TE = self._all_scores(logits_TE)
            if token_mask_T is not None:
                scores_TE = scores_TE.masked_fill(~token_mask_T[:, None], 0)
            balancing = load_balancing_loss(scores_TE, share)
        if share is not None and self._cfg.moe_z_loss_coeff:
            z = z_loss(logits_TE, share.micro_batch_tokens, token_mask_T)
        return balancing, z

    def _all_scores(self, logits_TE: Tensor) -> Tensor:
        """Scores of all experts, each token's summing to one."""
        if self._cfg.moe_router_score_function == "sigmoid":
            scores_TE = torch.sigmoid(logits_TE)
            return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        return torch.softmax(logits_TE, -1)


def _checked_sizes(model_cfg: ModelConfig, moe_cfg: MoEConfig) -> tuple[int, int]:
    """(E, D); raises ConfigError on settings that no router can have."""
    num_experts, topk = moe_cfg.num_experts, moe_cfg.moe_router_topk
    if num_experts is None or model_cfg.hidden_size is None:
        raise ConfigError("moe.num_experts and model.hidden_size must be given: set --num-experts and --hidden-size")
    if not 1 <= topk <= num_experts:
        raise ConfigError(
            f"moe.moe_router_topk ({topk}) must be at least 1 and at most moe.num_experts ({num_experts}): change "
            "--moe-router-topk or --num-experts"
        )
    if moe_cfg.moe_router_enable_expert_bias and moe_cfg.moe_router_score_function != "sigmoid":
        raise ConfigError(
            "moe.moe_router_enable_expert_bias (True) must be off with moe.moe_router_score_function "
            f"({moe_cfg.moe_router_score_function}): set --moe-router-score-function sigmoid"
        )
    return num_experts, model_cfg.hidden_size


@torch.no_grad()
def update_expert_biases(routers: Iterable[TopKRouter], ctx: ParallelContext) -> None:
    """Close an optimizer step that was taken: move the expert biases and reset the step's counters.

    ``bias += rate * sign(mean load - load)`` with loads counted over all micro-batches and ranks of the step, before
    capacity drops. One collective over a pipeline stage for all its routers; all its ranks must pass the same routers in the
    same order.
    """
    routers = list(routers)
    biased = [router for router in routers if router.expert_bias is not None]
    if biased:
        load_LE = sum_over(torch.stack([router._step_counts_E for router in biased]), ctx.stage)
        # Whole numbers: sign(mean - load) without rounding.
        direction_LE = torch.sign(load_LE.sum(-1, keepdim=True) - load_LE * load_LE.shape[-1])
        for router, direction_E in zip(biased, direction_LE, strict=True):
            assert router.expert_bias is not None
            router.expert_bias += direction_E * router._cfg.moe_router_bias_update_rate
    for router in routers:
        router.discard_counts()


def top_ids(scores_TE: Tensor, topk: int) -> Tensor:
    """Ids of the K largest scores, best first; the lowest id wins a tie.

    ``torch.topk`` leaves the order of ties open and differs between devices; ``argmax`` names the first. K passes over the
    scores are cheap for the K in use.
    """
    left_TE = scores_TE.clone()
    columns = []
    for _ in range(topk):
        best_T1 = left_TE.argmax(-1, keepdim=True)
        left_TE.scatter_(1, best_T1, float("-inf"))
        columns.append(best_T1)
    return torch.cat(columns, 1)


def group_limited_ids(scores_TE: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Ids of each token's K best experts among those of its ``group_topk`` best groups, best first.

    Groups are ``num_groups`` equal ranges of experts (DeepSeek-V3's nodes, arXiv 2412.19437, section 2.1.2). A group's score
    is, as in Megatron-LM, the sum of its K // group_topk largest scores. The lowest id wins ties, of groups too.
    """
    num_experts = scores_TE.shape[1]
    scores_TGN = scores_TE.unflatten(1, (num_groups, num_experts // num_groups))
    group_scores_TG = scores_TGN.topk(topk // group_topk, dim=-1).values.sum(-1)
    near_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    near_TG.scatter_(1, top_ids(group_scores_TG, group_topk), True)
    return top_ids(scores_TGN.masked_fill(~near_TG[..., None], float("-inf")).flatten(1), topk)


def sinkhorn_plan(logits_TE: Tensor, token_mask_T: Tensor | None = None, tolerance: float = 1e-4) -> Tensor:
    """Transport plan that spreads this rank's tokens evenly over the experts (S-BASE, arXiv 2202.01169, section 3.1).

    Rows and columns of exp(logits) are scaled in turn until each row sums to 1/T and each column to 1/E. As in Megatron-LM
    this ends when the columns' factors change by at most ``tolerance`` on average (which waits for the device); here also
    after 200 rounds, because it may never get there for logits that differ by more than 50 or so (3 to 30 rounds are usual).

    Returns:
        fp32 [T, E] (fp64 for fp64 logits). Masked tokens have rows of zeros and are not counted in T.
    """
    epsilon = 1e-8
    logits_TE = logits_TE.to(torch.promote_types(torch.float32, logits_TE.dtype))
    cost_TE = torch.exp(logits_TE - logits_TE.amax(-1, keepdim=True))  # a row's factor takes up its scale
    num_tokens: Tensor | int
    num_tokens, num_experts = cost_TE.shape
    if token_mask_T is not None:
        cost_TE, num_tokens = cost_TE * token_mask_T[:, None], token_mask_T.sum()
    columns_E = cost_TE.new_ones(num_experts)
    for _ in range(200):
        rows_T = 1 / (num_tokens * ((cost_TE * columns_E).sum(1) + epsilon))
        previous_E, columns_E = columns_E, 1 / (num_experts * ((cost_TE * rows_T[:, None]).sum(0) + epsilon))
        if not (columns_E - previous_E).abs().mean() > tolerance:
            break
    return columns_E * cost_TE * rows_T[:, None]


def balanced_ids(
    random: Tensor, num_tokens: int, topk: int, num_experts: int, token_mask_T: Tensor | None = None
) -> Tensor:
    """Random expert ids with even load, for benchmarks: experts differ by at most K rows (masked tokens aside).

    Tokens in random order go round the experts, once per choice, each choice with its own random offset.

    Args:
        random: uniform numbers in [0, 1), T + E of them.
    """
    keys_T, keys_E = random.split([num_tokens, num_experts])
    if token_mask_T is not None:
        keys_T = keys_T + (~token_mask_T)  # masked tokens last
    place_T = torch.argsort(torch.argsort(keys_T, stable=True))
    offsets_K = torch.argsort(keys_E, stable=True)[:topk]
    return (place_T[:, None] + offsets_K) % num_experts


class _RouterLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` in the router's precision; keeps x for the backward pass in its own."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.bias_dtype = None if bias_E is None else bias_E.dtype
        logits_TE = x_TD.to(dtype) @ weight_ED.to(dtype).t()
        return logits_TE if bias_E is None else logits_TE + bias_E.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (grad_TE,) = grads
        x_TD, weight_ED = ctx.saved_tensors
        grad_x = (grad_TE @ weight_ED.to(grad_TE.dtype)).to(x_TD.dtype)
        grad_weight = (grad_TE.t() @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_TE.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
