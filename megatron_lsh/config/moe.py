"""Mixture-of-experts settings: router, experts, token dispatcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.flag import flag
from megatron_lsh.config.rates import Rates, rate_text

WIRE_DTYPES = ("fp32", "bf16", "fp8", "int8", "int4", "mxfp4", "int4x32")


def _pattern_text(value: Any) -> str:
    """YAML may hold an integer or a list where the command line has ``2`` or ``[0,1]``."""
    return str(value)


@dataclass
class MoEConfig:
    """Router, experts and dispatcher. Names, defaults and meaning are Megatron-LM's unless the help says otherwise."""

    num_experts: int | None = flag(None, "Number of experts E per MoE layer (absent: a dense model)", at_least=1)
    moe_layer_freq: str = flag(
        "1",
        "Which layers are MoE: an integer n (every n-th, starting at layer 0) or a list such as ([0]*3+[1]*58)",
        parse=_pattern_text,
    )
    moe_ffn_hidden_size: int | None = flag(None, "Width F of one expert (default: --ffn-hidden-size)", at_least=1)
    moe_latent_size: int | None = flag(
        None,
        "Width of rows on their way and in the experts: a linear map from --hidden-size to this before dispatch, and back "
        "after the combination; router and shared expert keep the full width",
        at_least=1,
    )
    moe_shared_expert_intermediate_size: int | None = flag(
        None, "Width of the shared expert (absent: none)", at_least=1
    )
    moe_shared_expert_overlap: bool = flag(
        False, "Run the shared expert while rows travel to the routed ones, forward and backward"
    )
    moe_overlap_chunks: int = flag(
        1,
        "Pieces in which rows travel, cut by local expert: the experts of one run while the next is under way (ours)",
        at_least=1,
        at_most=64,
    )
    moe_shared_expert_gate: bool = flag(False, "Scale the shared expert by a learned sigmoid gate per token")
    moe_grouped_gemm: bool = flag(False, "Accepted for compatibility: experts always use a grouped GEMM where it runs")
    moe_router_topk: int = flag(2, "Experts per token, K", at_least=1)
    moe_router_load_balancing_type: str = flag(
        "aux_loss",
        "Load-balancing loss; load_importance is Tutel's (ours; needs --moe-router-gate-noise); sinkhorn is none, but in "
        "training a transport plan spreads each rank's tokens evenly",
        choices=("aux_loss", "seq_aux_loss", "global_aux_loss", "load_importance", "sinkhorn", "none"),
    )
    moe_router_dtype: str = flag(
        "fp32", "Precision of the router's logits and scores (Megatron: the model's)", choices=("fp32", "fp64")
    )
    moe_router_type: str = flag(
        "linear",
        "How logits are made of a token: by a matrix, or as the cosine between its projection and a vector of the expert "
        "at a learned temperature (ours; Tutel's cosine_top)",
        choices=("linear", "cosine"),
    )
    moe_router_bias: bool = flag(
        True, "Bias of the router where linear layers have biases (ours)", off="--disable-router-bias"
    )
    moe_router_gate_noise: float = flag(
        0.0,
        "Standard deviation, times the number of experts, of noise on the logits in training (ours; Tutel's gate_noise)",
        at_least=0,
    )
    moe_router_score_function: str = flag("softmax", "Score of the logits", choices=("softmax", "sigmoid"))
    moe_router_pre_softmax: bool = flag(False, "Softmax before the top-k instead of after it")
    moe_router_num_groups: int | None = flag(
        None, "Number of equal groups of neighbouring experts for --moe-router-group-topk", at_least=1
    )
    moe_router_group_topk: int | None = flag(
        None,
        "Number of groups among whose experts a token chooses: those with the largest sums of their topk / group-topk best "
        "scores (absent: all)",
        at_least=1,
    )
    moe_router_topk_scaling_factor: float | None = flag(None, "Multiply the routing weights by this", above=0)
    moe_router_enable_expert_bias: bool = flag(
        False, "Balance by a bias per expert that moves with the load instead of a loss (sigmoid scores only)"
    )
    moe_router_bias_update_rate: float = flag(1e-3, "Step of the expert bias per iteration", at_least=0)
    moe_router_force_load_balancing: bool = flag(False, "Route at random and evenly (for benchmarks)")
    moe_aux_loss_coeff: float = flag(0.0, "Weight of the load-balancing loss", at_least=0)
    moe_z_loss_coeff: float | None = flag(None, "Weight of the router z-loss (absent: none)", at_least=0)
    moe_input_jitter_eps: float | None = flag(
        None, "Multiply router inputs by uniform noise in [1-eps, 1+eps]", at_least=0, below=1
    )
    moe_token_dispatcher_type: str = flag(
        "alltoall",
        "How rows reach their experts: alltoall, allgather, lsh, auto (lsh in the layers where it is measured to save "
        "time, else alltoall), or a name registered by a plug-in "
        "(Megatron's default is allgather)",
    )
    moe_node_deduplication: str = flag(
        "auto",
        "Exact dispatch over several nodes: send a token once to each node that has experts of it, instead of once per "
        "expert; auto: where that sends fewer bytes",
        choices=("auto", "on", "off"),
    )
    moe_expert_capacity_factor: float | None = flag(
        None, "Rows per expert, as a multiple of the mean (absent: dropless)", above=0
    )
    moe_token_drop_policy: str = flag(
        "probs",
        "Which rows to keep within the capacity: those of largest weight, of the first tokens, or (ours) as Tutel does all "
        "first choices before all second ones, tokens with the largest best score first",
        choices=("probs", "position", "batch-priority"),
    )
    moe_capacity_rounding: str = flag(
        "ceil",
        "Capacity of T tokens with K choices of E experts: ceil(T K / E x factor), or (ours) as Tutel rounds, "
        "K int(factor x ceil(T / E))",
        choices=("ceil", "tutel"),
    )
    eval_capacity: bool = flag(True, "Capacity in evaluations (ours)", off="--no-eval-capacity")
    moe_expert_dropout: float = flag(
        0.0, "Dropout behind the activation function of experts (ours)", at_least=0, below=1
    )
    moe_gradient_shortcut: bool = flag(
        False,
        "Add the identity to the gradient of every expert, and nothing to its value (an experiment; docs/lsh.md)",
    )
    moe_layer_recompute: bool = flag(False, "Recompute the MoE layer in the backward pass")
    moe_per_layer_logging: bool = flag(False, "Log router and dispatcher statistics per layer")


@dataclass
class LSHConfig:
    """The LSH token dispatcher (``--moe-token-dispatcher-type lsh`` or ``auto``). See docs/lsh.md."""

    lsh_clustering: str = flag(
        "budget",
        "budget: a share of each expert's rows travels, --lsh-target-rate at most; bucket: one centroid per distinct code, "
        "the paper's method, whose rate depends on the data",
        choices=("bucket", "budget"),
    )
    lsh_target_rate: str = flag(
        "0.2",
        "With budget clustering, send at most ceil(rate x rows) centroids per rank (or node) and expert; one rate above 0 "
        "and at most 1, a list with one per layer or per stack of the model such as [0.1]*2+[0.2]*10, or several of these "
        "with the iterations from which they hold: 0.1,0.2@1000",
        parse=rate_text,
    )
    lsh_target_energy: float | None = flag(
        None,
        "With budget clustering, let the rate of every layer follow its residual energy |x-c|^2/|x|^2, so that this much is "
        "missed: --lsh-target-rate is the most that is sent then, and where each layer begins (absent: rates are fixed)",
        above=0,
        below=1,
    )
    lsh_least_rate: float = flag(0.05, "The lowest rate under --lsh-target-energy", above=0, at_most=1)
    lsh_refine_steps: int = flag(
        1, "With budget clustering, reassign rows to their nearest centroid this many times", at_least=0
    )
    lsh_num_hashes: int | None = flag(
        None, "Number q of cross-polytope hashes per row (default: 6 with budget clustering, 2 with bucket)", at_least=1
    )
    lsh_hash_width: int | None = flag(
        None, "Width w of one hash: 2 w possible values (default: 16 with budget clustering, 8 with bucket)", at_least=1
    )
    lsh_residual: str = flag(
        "interpolate",
        "What a row adds to its centroid's expert output: nothing, row - centroid (the paper's), that plus a learned "
        "low-rank map of it, or the change between the two of a function fitted to all centroids' outputs",
        choices=("none", "identity", "lowrank", "interpolate"),
    )
    lsh_representative: str | None = flag(
        None,
        "What is sent for a cluster: the mean of its rows, or its row nearest to the mean (default: member with "
        "--lsh-residual interpolate, else mean)",
        choices=("mean", "member"),
    )
    lsh_interpolation_block: int | None = flag(
        None,
        "Most representatives of one expert that --lsh-residual interpolate fits a function to; an expert with more gets "
        "several. Larger: closer outputs, more time per row. auto: as many as cost 5% of the exact experts' arithmetic, "
        "but 128 at least (default: auto)",
        at_least=2,
        parse=lambda value: None if value == "auto" else value,
    )
    lsh_interpolation_rank: int | None = flag(
        None,
        "Coordinates of rows and outputs that this function sees: the leading ones of its representatives. full: all; auto "
        "(or 0): the most that leave room in 5% of the exact experts' arithmetic for blocks four times as large, where an "
        "expert has so many representatives (default: full)",
        at_least=0,
        parse=lambda value: {"full": None, "auto": 0}.get(value, value),
    )
    lsh_residual_rank: int = flag(16, "Rank of --lsh-residual lowrank", at_least=1)
    lsh_gradient: str = flag(
        "exact",
        "Gradient of the restored rows: that of the formula, or (with --lsh-residual none) also the identity's, as if the "
        "residual had been added",
        choices=("exact", "straight-through"),
    )
    lsh_scope: str | None = flag(
        None,
        "Whose rows cluster together: those of all ranks of a node before they cross the network, or of each rank alone "
        "(default: node, where expert parallelism spans nodes of several ranks)",
        choices=("node", "rank"),
    )
    lsh_wire_dtype: str | None = flag(
        None,
        "Numbers in which rows travel, with any dispatcher and both ways (default: those of the model); fp8, int8 and int4 "
        "have a scale per row, mxfp4 and int4x32 one per 32 numbers",
        choices=WIRE_DTYPES,
    )
    lsh_wire_dtype_backward: str | None = flag(
        None, "Numbers in which gradients travel (default: --lsh-wire-dtype)", choices=WIRE_DTYPES
    )
    lsh_seed: int = flag(1234, "Seed of the random rotations; the same on every rank and after a resume", at_least=0)
    lsh_warmup_iters: int = flag(0, "Run the exact all-to-all for this many first iterations", at_least=0)
    lsh_anneal_iters: int = flag(0, "Run the exact all-to-all for this many last iterations", at_least=0)
    lsh_start_layer: int = flag(
        0, "Run the exact all-to-all in the layers before this one (counted from 0)", at_least=0
    )
    lsh_auto_iters: int = flag(
        10, "With the auto dispatcher, measure this many iterations with LSH and as many without, in turn", at_least=1
    )
    lsh_eval: str = flag(
        "on",
        "Evaluate with LSH and wire dtype, without them (what an exported model computes), or both",
        choices=("on", "off", "both"),
    )
    lsh_probe_interval: int | None = flag(
        None,
        "Every so many iterations, also run the exact experts on one micro-batch and log the error of the restored rows",
        at_least=1,
    )
    lsh_probe_warn: float = flag(
        0.05,
        "Say in the log when the error of the restored rows of a layer, found by --lsh-probe-interval, rises above this "
        "(0: never)",
        at_least=0,
    )

    def rates(self) -> Rates:
        """What is sent, by layer and by iteration."""
        return Rates.of(self.lsh_target_rate).following(self.lsh_target_energy, self.lsh_least_rate)

    def sends_members(self) -> bool:
        """--lsh-representative with its default filled in."""
        return (self.lsh_representative or ("member" if self.lsh_residual == "interpolate" else "mean")) == "member"

    def hash_shape(self) -> tuple[int, int]:
        """(q, w) with the defaults filled in. Budgets cut a fine hash where they need to; buckets need a coarse one."""
        hashes, width = (6, 16) if self.lsh_clustering == "budget" else (2, 8)
        return self.lsh_num_hashes or hashes, self.lsh_hash_width or width
