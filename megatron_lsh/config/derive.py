"""Values that follow from others: the second half of ``validate``. Each rule is Megatron-LM's unless it says otherwise."""

from __future__ import annotations

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config
from megatron_lsh.config.data_paths import DEFAULT_SPLIT
from megatron_lsh.config.layout_rules import derive_context_parallel, derive_pipeline, model_parallel_size


def derive(cfg: Config, check: Checker, world_size: int) -> None:
    """Fill in every setting that was left to its default and follows from others. Says so where that may surprise."""
    _derive_model(cfg, check)
    _derive_moe_and_parallel(cfg, check)
    _derive_training(cfg, check, world_size)
    _derive_recompute(cfg, check)
    if cfg.data.tokenizer_type is None and cfg.data.vocab_file is not None and cfg.default_tokenizer is not None:
        check.fill("tokenizer_type", cfg.default_tokenizer)
    if cfg.checkpoint.ckpt_format in ("torch", "fsdp_dtensor"):
        check.notice(
            f"--ckpt-format {cfg.checkpoint.ckpt_format} is taken as torch_dist, the one format that is written"
        )
    per_split = cfg.data.train_data_path or cfg.data.valid_data_path or cfg.data.test_data_path
    if cfg.data.split is None and not per_split and cfg.indexed_data:
        check.fill("split", DEFAULT_SPLIT)


def _derive_model(cfg: Config, check: Checker) -> None:
    model = cfg.model
    hidden, heads = model.hidden_size, model.num_attention_heads
    if hidden is not None and model.ffn_hidden_size is None:
        check.fill("ffn_hidden_size", int(4 * hidden * 2 / 3) // 64 * 64 if model.swiglu else 4 * hidden)
    if hidden is not None and heads is not None and model.kv_channels is None and hidden % heads == 0:
        check.fill("kv_channels", hidden // heads)
    if heads is not None and not model.group_query_attention:
        if model.num_query_groups not in (1, heads):
            check.notice(f"no effect without --group-query-attention: --num-query-groups {model.num_query_groups}")
        check.fill("num_query_groups", heads)
    if model.max_position_embeddings is None:
        check.fill("max_position_embeddings", model.seq_length)


def _derive_moe_and_parallel(cfg: Config, check: Checker) -> None:
    parallel, moe = cfg.parallel, cfg.moe
    if moe.num_experts is not None and moe.moe_ffn_hidden_size is None:
        check.fill("moe_ffn_hidden_size", cfg.model.ffn_hidden_size)
    if moe.num_experts is not None:
        _derive_router(cfg, check)
    if parallel.tensor_model_parallel_size == 1:
        if parallel.sequence_parallel:
            check.notice("no effect with --tensor-model-parallel-size 1: --sequence-parallel")
        check.fill("sequence_parallel", False)
    elif moe.num_experts is not None:
        if not parallel.sequence_parallel:
            check.notice("--sequence-parallel is turned on: MoE with tensor parallelism needs it")
        check.fill("sequence_parallel", True)
        if parallel.expert_tensor_parallel_size is None:
            check.notice(
                "experts are not cut over tensor-parallel ranks: --expert-tensor-parallel-size is 1 (Megatron-LM: "
                f"{parallel.tensor_model_parallel_size}, the tensor-parallel size)"
            )
    if moe.num_experts is None and parallel.expert_tensor_parallel_size not in (None, 1):
        check.notice("no effect without --num-experts: --expert-tensor-parallel-size")
        check.fill("expert_tensor_parallel_size", 1)
    elif parallel.expert_tensor_parallel_size is None:
        check.fill("expert_tensor_parallel_size", 1)
    derive_pipeline(cfg, check)
    derive_context_parallel(cfg, check)


def _derive_router(cfg: Config, check: Checker) -> None:
    """What Megatron-LM does with settings of the router that do not go together, and says nothing of."""
    moe = cfg.moe
    if moe.moe_token_dispatcher_type == "flex":
        check.notice("--moe-token-dispatcher-type flex is taken as alltoall: the same rows travel, by other kernels")
        check.fill("moe_token_dispatcher_type", "alltoall")
    if moe.moe_router_load_balancing_type == "sinkhorn":
        scores = ("sigmoid", False) if moe.moe_router_topk == 1 else ("softmax", True)
        if scores != (moe.moe_router_score_function, moe.moe_router_pre_softmax):
            check.notice(
                f"sinkhorn with --moe-router-topk {moe.moe_router_topk} weighs experts by {scores[0]} scores of all, as in "
                "Megatron-LM: --moe-router-score-function and --moe-router-pre-softmax follow"
            )
        check.fill("moe_router_score_function", scores[0])
        check.fill("moe_router_pre_softmax", scores[1])
    elif moe.moe_router_pre_softmax and moe.moe_router_score_function != "softmax":
        check.notice(
            f"no effect with --moe-router-score-function {moe.moe_router_score_function}, as in Megatron-LM: "
            "--moe-router-pre-softmax"
        )
        check.fill("moe_router_pre_softmax", False)
    if moe.moe_router_num_groups is not None and moe.moe_router_group_topk is None:
        check.notice("no effect without --moe-router-group-topk: --moe-router-num-groups")


def _derive_training(cfg: Config, check: Checker, world_size: int) -> None:
    training, optimizer = cfg.training, cfg.optimizer
    ranks = model_parallel_size(cfg)
    if training.skip_train:  # needs no state of the training, and none of its curves must be as they were
        check.fill("load_optim", False)
        check.fill("load_rng", False)
    if training.global_batch_size is None and training.micro_batch_size is not None and world_size % ranks == 0:
        check.fill("global_batch_size", training.micro_batch_size * (world_size // ranks))
    if training.train_samples is not None:
        if training.train_iters is None and training.global_batch_size is not None:
            check.fill("train_iters", training.train_samples // training.global_batch_size)
        if optimizer.lr_decay_samples is None:
            check.fill("lr_decay_samples", training.train_samples)
    elif optimizer.lr_decay_iters is None:
        check.fill("lr_decay_iters", training.train_iters)
    if optimizer.weight_decay_incr_style == "constant":
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(optimizer, name) is None:
                check.fill(name, optimizer.weight_decay)


def _derive_recompute(cfg: Config, check: Checker) -> None:
    recompute = cfg.recompute
    if recompute.recompute_granularity is None:
        if recompute.recompute_modules != ["core_attn"] and not recompute.recompute_activations:
            check.notice("no effect without --recompute-granularity selective: --recompute-modules")
        if recompute.recompute_activations:
            check.fill("recompute_granularity", "selective")
        elif cfg.moe.moe_layer_recompute:  # Megatron: core_attn as well
            check.fill("recompute_granularity", "selective")
            check.fill("recompute_modules", ["moe"])
    granularity, modules = recompute.recompute_granularity, recompute.recompute_modules
    if granularity == "selective" and cfg.moe.moe_layer_recompute and "moe" not in modules:
        check.fill("recompute_modules", [*modules, "moe"])
    if recompute.recompute_granularity == "full":  # Megatron asks for both
        if recompute.recompute_method is None:
            check.fill("recompute_method", "uniform")
        if recompute.recompute_num_layers is None:
            check.fill("recompute_num_layers", 1)
