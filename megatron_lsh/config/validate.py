"""``validate``: every check of the configuration that needs neither ranks nor data, before either is touched."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import TypeVar

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config
from megatron_lsh.config.data_paths import data_problems
from megatron_lsh.config.derive import derive
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.config.layout_rules import check_context_parallel, check_pipeline, model_parallel_size
from megatron_lsh.config.settings import shown
from megatron_lsh.config.without_effect import tell_what_nothing_reads
from megatron_lsh.errors import ConfigError

C = TypeVar("C", bound=Config)

_DIVISIBLE = "{%s} must be divisible by {%s}"


def validate(cfg: C, world_size: int) -> C:
    """Check a configuration and fill in what follows from it.

    Args:
        cfg: as :func:`parse_args` returns it, or already validated (then derived values are derived again). Not changed.
        world_size: number of ranks of the run; see :func:`assumed_world_size`.

    Returns:
        A copy whose derived settings have values and are listed in ``derived``; unexpected changes go to ``notices``.

    Raises:
        ConfigError: with one line (field, value, rule, fix) per problem, as many as can be found at once.
    """
    cfg = copy.deepcopy(cfg)
    check = Checker(cfg)
    if world_size < 1:
        raise ConfigError(f"world size ({world_size}) must be at least 1: change --world-size or WORLD_SIZE")
    check.forget_derived()
    check.every_value()
    cfg.derive_own(check, world_size)
    check.required("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size")
    derive(cfg, check, world_size)
    _check_model(cfg, check)
    cfg.check_own(check)
    _check_moe(cfg, check)
    _check_layout(cfg, check, world_size)
    _check_length_and_batch(cfg, check, world_size)
    _check_schedules(cfg, check)
    _check_recompute(cfg, check)
    _check_data(cfg, check)
    _check_checkpoint(cfg, check)
    _check_logging(cfg, check, world_size)
    tell_what_nothing_reads(cfg, check)
    check.finish()
    if not cfg.training.dry_run:
        _try_writing(cfg, check)  # last: it creates folders
        check.finish()
    return cfg


def check_model(cfg: Config) -> None:
    """The rules for the model alone: sizes, attention, experts. For settings that come from another framework's file.

    Args:
        cfg: not changed.

    Raises:
        ConfigError: with one line per problem.
    """
    cfg = copy.deepcopy(cfg)
    check = Checker(cfg)
    check.forget_derived()
    check.every_value()
    check.required("num_layers", "hidden_size", "num_attention_heads")
    derive(cfg, check, 1)
    _check_model(cfg, check)
    _check_moe(cfg, check)
    check.finish()


def assumed_world_size(cfg: Config) -> int:
    """Number of ranks to validate for: --world-size under --dry-run, else the environment's WORLD_SIZE, else 1.

    Raises:
        ConfigError: if WORLD_SIZE is not a number.
    """
    if cfg.training.dry_run and cfg.parallel.world_size is not None:
        return cfg.parallel.world_size
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise ConfigError(f"the environment's WORLD_SIZE ({text}) must be a number: start the ranks with torchrun")
    return int(text)


def _check_model(cfg: Config, check: Checker) -> None:
    if cfg.model.kv_channels is None:
        check.rule(_DIVISIBLE % ("hidden_size", "num_attention_heads"), _divides)
    check.rule(  # the default of a very narrow SwiGLU model
        "{ffn_hidden_size} must be at least 1", lambda width: width >= 1, "set --ffn-hidden-size"
    )
    check.rule(_DIVISIBLE % ("num_attention_heads", "num_query_groups"), _divides)
    check.rule("{seq_length} must be at most {max_position_embeddings}", lambda length, most: length <= most)
    if cfg.model.position_embedding_type == "rope":
        check.rule(
            "{kv_channels} times {rotary_percent} must be at least 2 and even, because rope turns channels in pairs",
            lambda width, share: int(width * share) >= 2 and int(width * share) % 2 == 0,
        )
    if cfg.model.qk_layernorm:
        check.rule(
            "{qk_layernorm_width} must be head with {normalization}",
            lambda width, norm: width == "head" or norm == "RMSNorm",
            "set --normalization RMSNorm or drop --qk-layernorm-width",
        )
    check.rule(
        "{add_position_embedding} must be on with {position_embedding_type}",
        lambda learned, kind: learned or kind != "learned_absolute",
        "drop --no-position-embedding, or use --position-embedding-type rope or none",
    )


def _check_moe(cfg: Config, check: Checker) -> None:
    moe = cfg.moe
    _check_rates(cfg, check)
    if moe.num_experts is None:
        check.rule(
            "{expert_model_parallel_size} must be 1 without experts",
            lambda ep: ep == 1,
            "set --num-experts or drop --expert-model-parallel-size",
        )
        if moe.moe_token_dispatcher_type != "alltoall":
            check.notice("no effect without --num-experts: --moe-token-dispatcher-type")
        return
    check.rule(_DIVISIBLE % ("num_experts", "expert_model_parallel_size"), _divides)
    check.rule("{moe_router_topk} must be at most {num_experts}", lambda k, experts: k <= experts)
    if cfg.model.num_layers is not None:
        try:
            if not any(moe_layer_pattern(moe.moe_layer_freq, cfg.model.num_layers)):
                check.rule("{moe_layer_freq} must make at least one layer an MoE layer", lambda freq: False)
        except ConfigError as error:
            check.problems.append(str(error))
    if moe.moe_token_dispatcher_type == "auto" and cfg.parallel.expert_model_parallel_size == 1:
        check.notice("auto dispatcher: exact, because with --expert-model-parallel-size 1 no row travels")
    check.rule(
        "{lsh_gradient} must be exact with {lsh_residual}",
        lambda gradient, residual: gradient == "exact" or residual == "none",
        "set --lsh-residual none: every other residual has a gradient of its own",
    )
    if moe.moe_router_load_balancing_type == "load_importance":
        check.rule(
            "{moe_router_gate_noise} must be above 0 with {moe_router_load_balancing_type}, which divides by it",
            lambda noise, _: noise > 0,
        )
        for size in ("tensor_model_parallel_size", "context_parallel_size"):
            check.rule(
                f"{{{size}}} must be 1 with {{moe_router_load_balancing_type}}, a loss of all tokens of a micro-batch",
                lambda size, _: size == 1,
            )
    if moe.moe_expert_capacity_factor is None:
        for name, usual in (("moe_token_drop_policy", "probs"), ("moe_capacity_rounding", "ceil")):
            if getattr(moe, name) != usual:
                check.notice(f"no effect without --moe-expert-capacity-factor: --{name.replace('_', '-')}")
    check.rule(
        "{moe_router_enable_expert_bias} must be off with {moe_router_score_function}",
        lambda bias, score: not bias or score == "sigmoid",
        "set --moe-router-score-function sigmoid",
    )
    check.rule(  # a softmax over one chosen expert is always 1: the router would get no gradient
        "{moe_router_topk} must be at least 2 with {moe_router_score_function} scores after the top-k "
        "({moe_router_pre_softmax})",
        lambda k, score, pre: k >= 2 or score != "softmax" or pre,
        "set --moe-router-pre-softmax or --moe-router-score-function sigmoid",
    )
    _check_groups(cfg, check)
    if moe.moe_router_load_balancing_type == "sinkhorn":
        _check_sinkhorn(check)
    check.rule(
        "{moe_shared_expert_gate} must be off without a shared expert",
        lambda gate: not gate or moe.moe_shared_expert_intermediate_size is not None,
        "set --moe-shared-expert-intermediate-size",
    )
    balanced = (
        moe.moe_router_enable_expert_bias
        or moe.moe_router_force_load_balancing
        or moe.moe_router_load_balancing_type == "sinkhorn"
        or (moe.moe_router_load_balancing_type != "none" and moe.moe_aux_loss_coeff > 0)
    )
    if not balanced:
        check.notice(
            "nothing balances the experts: set --moe-aux-loss-coeff (1e-2 is usual) or --moe-router-enable-expert-bias"
        )


def _check_rates(cfg: Config, check: Checker) -> None:
    """They get their one spelling. A list has one per layer, or one per stack and becomes one per layer."""
    stacks = cfg.layers_of_stacks()
    try:
        rates = cfg.lsh.rates()
        cfg.lsh.lsh_target_rate = str(rates.by_layer(stacks) if stacks and cfg.moe.num_experts is not None else rates)
    except ValueError as error:
        check.problems.append(
            f"lsh.lsh_target_rate ({shown(cfg.lsh.lsh_target_rate)}) {error}: change --lsh-target-rate"
        )
        return
    check.rule(
        "{lsh_probe_interval} must not be given with {moe_expert_dropout}: two passes through the experts differ by it",
        lambda interval, dropout: interval is None or dropout == 0.0,
        "drop --lsh-probe-interval or --moe-expert-dropout",
    )
    if cfg.lsh.lsh_target_energy is None:
        return
    if cfg.moe.num_experts is None or cfg.moe.moe_token_dispatcher_type in ("alltoall", "allgather"):
        check.notice("no effect without --num-experts and --moe-token-dispatcher-type lsh: --lsh-target-energy")
        return
    check.rule(
        "{lsh_target_energy} must not be given with {lsh_clustering} clustering, whose rate follows from the data",
        lambda energy, clustering: clustering == "budget",
        "drop --lsh-target-energy or --lsh-clustering",
    )
    check.rule(
        "{lsh_least_rate} must be at most {lsh_target_rate}",
        lambda least, _: least <= min(rate for _, phase in rates.phases for rate in phase),
        "lower --lsh-least-rate or raise --lsh-target-rate",
    )


def _check_groups(cfg: Config, check: Checker) -> None:
    if cfg.moe.moe_router_group_topk is None:
        return
    check.required("moe_router_num_groups")
    check.rule(_DIVISIBLE % ("num_experts", "moe_router_num_groups"), _divides)
    check.rule(
        "{moe_router_group_topk} must be at most {moe_router_num_groups}", lambda chosen, groups: chosen <= groups
    )
    check.rule(
        "{moe_router_topk} must be at least {moe_router_group_topk}, because a group's score is the sum of its best "
        "topk / group-topk",
        lambda k, chosen: k >= chosen,
    )
    check.rule(
        "{moe_router_topk} must be at most the {moe_router_group_topk} groups' share of {num_experts} in "
        "{moe_router_num_groups} groups",
        lambda k, chosen, experts, groups: k <= chosen * (experts // groups),
    )


def _check_sinkhorn(check: Checker) -> None:
    """As in Megatron-LM, where a part of this is silently ignored."""
    check.rule(
        "{moe_aux_loss_coeff} must be 0 with {moe_router_load_balancing_type}, which balances without a loss",
        lambda coeff, _: coeff == 0,
        "drop --moe-aux-loss-coeff",
    )
    for name in ("moe_router_group_topk", "moe_router_topk_scaling_factor"):
        check.rule(
            f"{{{name}}} must not be given with {{moe_router_load_balancing_type}}",
            lambda *_: False,
            f"drop --{name.replace('_', '-')}",
        )
    check.rule(
        "{moe_router_enable_expert_bias} must be off with {moe_router_load_balancing_type}",
        lambda bias, _: not bias,
        "drop --moe-router-enable-expert-bias",
    )


def _check_layout(cfg: Config, check: Checker, world_size: int) -> None:
    check.rule(
        "{expert_tensor_parallel_size} must be 1, because cutting experts is not implemented",
        lambda size: size == 1,
        "set --expert-tensor-parallel-size 1, and use --expert-model-parallel-size",
    )
    for size in ("tensor_model_parallel_size", "expert_model_parallel_size"):
        flag = "--" + size.replace("_", "-")
        check.rule(
            f"world size ({world_size}) must be divisible by {{{size}}}",
            lambda n: world_size % n == 0,
            f"change {flag} or the number of ranks",
        )
    check_context_parallel(cfg, check, world_size)
    check_pipeline(cfg, check, world_size)
    tp = "tensor_model_parallel_size"
    for name in ("num_attention_heads", "moe_shared_expert_intermediate_size"):
        check.rule(_DIVISIBLE % (name, tp), _divides)
    if cfg.moe.num_experts is None or cfg.moe.moe_layer_freq != "1":  # there are dense layers
        check.rule(_DIVISIBLE % ("ffn_hidden_size", tp), _divides)
    if cfg.model.group_query_attention:
        check.rule(_DIVISIBLE % ("num_query_groups", tp), _divides)
    if cfg.parallel.sequence_parallel:
        check.rule(_DIVISIBLE % ("seq_length", tp) + " with sequence parallelism", _divides)
    check.rule(
        "{distributed_backend} must be gloo on {device}", lambda backend, device: (backend, device) != ("nccl", "cpu")
    )


def _check_length_and_batch(cfg: Config, check: Checker, world_size: int) -> None:
    training = cfg.training
    ranks = model_parallel_size(cfg)
    if world_size % ranks == 0:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        divisors = " / ".join(f"{{{name}}}" for name in sizes if name == sizes[0] or getattr(cfg.parallel, name) > 1)
        check.rule(
            f"{{global_batch_size}} must be divisible by {{micro_batch_size}} times the data-parallel size "
            f"({world_size // ranks} = world size {world_size} / {divisors})",
            lambda total, micro, *_: total % (micro * (world_size // ranks)) == 0,
            "change --global-batch-size or --micro-batch-size",
        )
    if "train_iters" not in cfg.derived:
        only_one = "{train_iters} and {train_samples} must not both be given"
        check.rule(only_one, lambda iters, samples: False, "drop one of --train-iters and --train-samples")
    check.rule("{train_samples} must be at least {global_batch_size}", lambda samples, batch: samples >= batch)
    if not training.dry_run:
        check.required("lr")
        if training.train_samples is None and training.train_iters is None and "train_iters" not in check.broken:
            check.problems.append("training.train_iters (absent) must be given: set --train-iters or --train-samples")


def _check_schedules(cfg: Config, check: Checker) -> None:
    unit, other = ("samples", "iters") if cfg.training.train_samples is not None else ("iters", "samples")
    for name in (f"lr_decay_{other}", f"lr_wsd_decay_{other}", f"lr_warmup_{other}"):
        check.rule(
            f"{{{name}}} must not be given for a run that is counted in {unit}",
            lambda value: value == 0,
            f"give --{name.replace(other, unit).replace('_', '-')} instead",
        )
    check.rule("{min_lr} must be at most {lr}", lambda low, high: low <= high)
    if cfg.optimizer.decoupled_lr is not None:
        check.rule("{decoupled_min_lr} must be at most {decoupled_lr}", lambda low, high: low <= high)
    else:
        check.rule("{decoupled_min_lr} must not be given", lambda _: False, "set --decoupled-lr")
    check.rule("{fp16} and {bf16} must not both be on", lambda a, b: not (a and b), "drop one of them")
    check.rule("{min_loss_scale} must be at most {initial_loss_scale}", lambda low, high: low <= high)
    check.rule("{lr_warmup_init} must be at most {lr}", lambda low, high: low <= high)
    check.rule(f"{{lr_warmup_{unit}}} must be less than {{lr_decay_{unit}}}", lambda warmup, decay: warmup < decay)
    check.rule(
        f"{{lr_warmup_fraction}} and {{lr_warmup_{unit}}} must not both be given",
        lambda fraction, warmup: warmup == 0,
        "drop one of them",
    )
    if cfg.optimizer.lr_decay_style == "WSD":
        check.required(f"lr_wsd_decay_{unit}")
        check.rule(f"{{lr_wsd_decay_{unit}}} must be at most {{lr_decay_{unit}}}", lambda last, all_: last <= all_)
    if cfg.optimizer.weight_decay_incr_style == "constant":
        for name in ("start_weight_decay", "end_weight_decay"):
            check.rule(
                f"{{{name}}} must be {{weight_decay}} with {{weight_decay_incr_style}} weight decay",
                lambda edge, constant, style: edge == constant,
                "set --weight-decay-incr-style linear or cosine, or drop it",
            )
    else:
        check.required("start_weight_decay", "end_weight_decay")
    check.rule(
        "{optimizer} must be adam with {use_apex_adam}",
        lambda kind, apex: kind == "adam" or not apex,
        "drop one of them",
    )
    check.rule(
        "{override_opt_param_scheduler} and {use_checkpoint_opt_param_scheduler} must not both be on",
        lambda override, use: not (override and use),
        "drop one of them",
    )


def _check_recompute(cfg: Config, check: Checker) -> None:
    for switch in ("recompute_activations", "moe_layer_recompute"):
        check.rule(
            f"{{{switch}}} must be off with {{recompute_granularity}} recomputation",
            lambda on, granularity: not on or granularity != "full",
            "drop one of them",
        )
    if cfg.recompute.recompute_granularity != "full":
        for name in ("recompute_method", "recompute_num_layers"):
            check.rule(
                f"{{{name}}} must not be given without full recomputation",
                lambda _: False,
                "set --recompute-granularity full or drop it",
            )
    check.rule("{recompute_num_layers} must be at most {num_layers}", lambda some, all_: some <= all_)


def _check_data(cfg: Config, check: Checker) -> None:
    data = cfg.data
    check.problems += data_problems(data)
    if cfg.training.dry_run:  # reads neither data nor tokenizer
        return
    if (
        cfg.indexed_data
        and not data.mock_data
        and not any((data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path))
    ):
        check.problems.append(
            "data.data_path (absent) must be given: set --data-path, or --mock-data to try things out"
        )
    if cfg.tokenized and not data.mock_data:
        check.required("tokenizer_type")
        if data.tokenizer_type == "NullTokenizer":
            check.required("vocab_size")
    if data.tokenizer_type in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        check.required("vocab_file")
    elif data.tokenizer_type == "GPT2BPETokenizer":
        check.required("vocab_file", "merge_file")
    elif data.tokenizer_type not in (None, "ByteTokenizer", "NullTokenizer"):
        check.required("tokenizer_model")


def _check_checkpoint(cfg: Config, check: Checker) -> None:
    checkpoint = cfg.checkpoint
    check.rule(_DIVISIBLE % ("save_retain_interval", "save_interval"), _divides)
    _check_upcycling(cfg, check)
    if checkpoint.load is None:
        check.rule("{ckpt_step} must not be given without a folder", lambda _: False, "set --load")
        check.rule("{exit_on_missing_checkpoint} must be off without a folder", lambda on: not on, "set --load")
        if checkpoint.pretrained_checkpoint is None:
            check.rule(
                "{finetune} must be off without weights", lambda on: not on, "set --load or --pretrained-checkpoint"
            )


def _check_upcycling(cfg: Config, check: Checker) -> None:
    checkpoint = cfg.checkpoint
    if not checkpoint.moe_use_upcycling:
        return
    check.required("num_experts", "save")
    source = checkpoint.pretrained_checkpoint if checkpoint.load in (None, checkpoint.save) else checkpoint.load
    check.rule(
        "{moe_use_upcycling} must be off without a dense checkpoint",
        lambda on: source is not None,
        "give --load DENSE, or --pretrained-checkpoint DENSE with --load and --save the same folder",
    )
    for name in ("num_experts", "moe_router_topk"):
        check.rule(_DIVISIBLE % (name, "moe_upcycling_granularity"), _divides)
    check.rule(
        "{moe_latent_size} must not be given with {moe_use_upcycling}: a dense layer has no narrower rows",
        lambda size, on: not on,
        "drop one of them",
    )


def _check_logging(cfg: Config, check: Checker, world_size: int) -> None:
    if cfg.logging.profile:
        check.rule("{profile_step_start} must be less than {profile_step_end}", lambda start, end: start < end)
        check.rule(
            f"{{profile_ranks}} must be below world size ({world_size})",
            lambda ranks: all(rank < world_size for rank in ranks),
        )


def _try_writing(cfg: Config, check: Checker) -> None:
    """Create each output folder and a file in it, so that a run does not find out at its first checkpoint."""
    jsonl = cfg.logging.metrics_jsonl
    folders = {
        "save": cfg.checkpoint.save,
        "tensorboard_dir": cfg.logging.tensorboard_dir,
        "wandb_save_dir": cfg.logging.wandb_save_dir if cfg.logging.wandb_project else None,
        "metrics_jsonl": os.path.dirname(os.path.abspath(jsonl)) if jsonl else None,
    }
    for name, folder in folders.items():
        if folder is None:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            why = f"{{{name}}} must be writable ({getattr(error, 'strerror', None) or error})"
            check.rule(why, lambda _: False, "choose another place or free it")


def _divides(number: int, divisor: int) -> bool:
    return number % divisor == 0
