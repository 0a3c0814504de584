"""What follows from sizes of parallelism, and what they ask of one another: a part of ``derive`` and of ``validate``."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config
from megatron_lsh.config.pipeline import Stages

_OF_PIPELINES = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)


def model_parallel_size(cfg: Config) -> int:
    """Ranks that share one sample: dense parameters have world size / this many data-parallel copies."""
    parallel = cfg.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def derive_pipeline(cfg: Config, check: Checker) -> None:
    """The number of virtual stages from their layers."""
    parallel, layers = cfg.parallel, cfg.model.num_layers
    if parallel.pipeline_model_parallel_size == 1:
        for name in _OF_PIPELINES:
            if getattr(parallel, name) is not None:
                check.notice(f"no effect with one pipeline stage: --{name.replace('_', '-')}")
        return
    check.rule(
        "{num_layers_per_virtual_pipeline_stage} and {num_virtual_stages_per_pipeline_rank} must not both be given",
        lambda *_: False,
        "drop one of them",
    )
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None and parallel.num_virtual_stages_per_pipeline_rank is None and layers is not None:
        check.fill("num_virtual_stages_per_pipeline_rank", layers // parallel.pipeline_model_parallel_size // per_chunk)


def derive_context_parallel(cfg: Config, check: Checker) -> None:
    """Whatever --cp-comm-type says, and if nothing does (Megatron-LM: p2p), changes no number."""
    if cfg.parallel.context_parallel_size > 1:
        check.notice("context parallelism gathers keys and values: every --cp-comm-type runs as all_gather")


def _must_be_1(check: Checker, size: str, why: str, instead: str) -> None:
    """Refuse a kind of parallelism that a family does not have."""
    flag = f"--{size.replace('_', '-')}"
    check.rule(f"{{{size}}} must be 1: {why}", lambda _: False, f"set {flag} 1, and use {instead}")


def check_context_parallel(cfg: Config, check: Checker, world_size: int) -> None:
    """Rules of ranks that share every sequence."""
    parallel, size = cfg.parallel, "context_parallel_size"
    if parallel.context_parallel_size == 1:
        return
    if cfg.why_no_context_parallel is not None:
        instead = "--tensor-model-parallel-size with --sequence-parallel"
        return _must_be_1(check, size, cfg.why_no_context_parallel, instead)
    sizes = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    others = [f"{{{name}}}" for name in sizes if getattr(parallel, name) > 1]
    check.rule(
        f"world size ({world_size}) must be divisible by {' times '.join([f'{{{size}}}', *others])}",
        lambda *factors: world_size % prod(factors) == 0,
        "change --context-parallel-size or the number of ranks",
    )
    check.rule(
        f"{{seq_length}} must be divisible by twice {{{size}}}, because each rank has a chunk of the head and one of "
        "the tail",
        lambda length, ranks: length % (2 * ranks) == 0,
    )
    if parallel.sequence_parallel:
        check.rule(
            f"{{seq_length}} must be divisible by twice {{{size}}} times {{tensor_model_parallel_size}} with sequence "
            "parallelism",
            lambda length, ranks, tp: length % (2 * ranks) != 0 or length % (2 * ranks * tp) == 0,
        )
    check.rule(
        f"{{sample_prompt}} must not be given with {{{size}}}: no rank has a whole sequence",
        lambda *_: False,
        "drop it; tools/generate.py loads the checkpoint without context parallelism",
    )


def check_pipeline(cfg: Config, check: Checker, world_size: int) -> None:
    """Rules of pipeline stages."""
    parallel = cfg.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return
    if cfg.why_no_pipeline is not None:
        instead = "--expert-model-parallel-size and --tensor-model-parallel-size"
        return _must_be_1(check, "pipeline_model_parallel_size", cfg.why_no_pipeline, instead)
    check.rule(
        f"world size ({world_size}) must be divisible by {{pipeline_model_parallel_size}}",
        lambda stages: world_size % stages == 0,
        "change --pipeline-model-parallel-size or the number of ranks",
    )
    if world_size % parallel.pipeline_model_parallel_size == 0:
        ranks = world_size // parallel.pipeline_model_parallel_size
        for size in ("tensor_model_parallel_size", "expert_model_parallel_size"):
            check.rule(
                f"ranks of a stage ({ranks} = world size {world_size} / {{pipeline_model_parallel_size}}) must be divisible "
                f"by {{{size}}}",
                lambda _, n: ranks % n == 0,
                f"change --pipeline-model-parallel-size, --{size.replace('_', '-')} or the number of ranks",
            )
    _check_layers(cfg, check)
    _check_micro_batches(cfg, check, world_size)
    check.rule(
        "{sample_prompt} must not be given with {pipeline_model_parallel_size}: no rank has the whole model",
        lambda _, stages: stages == 1,
        "drop it; tools/generate.py loads the checkpoint on one stage",
    )


def _check_layers(cfg: Config, check: Checker) -> None:
    """Every stage, and every chunk of one, has equally many, but for the first and the last where that is asked for."""
    ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    given = [name for name in ends if getattr(cfg.parallel, name) is not None]
    for name in given:
        check.rule(
            f"{{num_layers_per_virtual_pipeline_stage}} must not be given with {{{name}}}",
            lambda *_: False,
            "give --num-virtual-stages-per-pipeline-rank instead",
        )
    stages = Stages.from_config(cfg.parallel)
    uncut = replace(stages, chunks=1)

    def shared_out(layers: int, *_: int) -> bool:
        try:
            return min(uncut.layers_per_rank(layers)) > 0
        except ValueError:
            return False

    less = "".join(f" less {{{name}}}" for name in given)
    of = f" less the {len(given)} named" if given else ""
    before = len(check.problems)
    check.rule(
        f"{{num_layers}}{less} must be divisible by {{pipeline_model_parallel_size}}{of}, and leave none without a layer",
        shared_out,
        "change --num-layers or --pipeline-model-parallel-size, or give the first or last stage other numbers with "
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
    )
    if len(check.problems) > before or check.broken.intersection(ends) or cfg.model.num_layers is None:
        return
    sizes = uncut.layers_per_rank(cfg.model.num_layers)
    shown = sizes[0] if len(set(sizes)) == 1 else sizes
    check.rule(
        f"layers of a stage ({shown}) must be divisible by {{num_layers_per_virtual_pipeline_stage}}",
        lambda per_chunk: all(size % per_chunk == 0 for size in sizes),
    )
    if cfg.parallel.num_layers_per_virtual_pipeline_stage is None:
        check.rule(
            f"layers of a stage ({shown}) must be divisible by {{num_virtual_stages_per_pipeline_rank}}",
            lambda chunks: all(size % chunks == 0 for size in sizes),
        )
    least = min(sizes) // stages.chunks
    check.rule(
        f"{{recompute_num_layers}} must be at most {least}, the layers that a stage runs at a time",
        lambda layers: layers <= least,
    )


def _check_micro_batches(cfg: Config, check: Checker, world_size: int) -> None:
    """The interleaved schedule takes as many micro-batches at a time as there are stages."""
    training, ranks = cfg.training, model_parallel_size(cfg)
    if Stages.from_config(cfg.parallel).chunks == 1 or world_size % ranks or training.micro_batch_size is None:
        return
    at_once = training.micro_batch_size * (world_size // ranks)
    check.rule(
        f"micro-batches of a global batch ({{global_batch_size}} / {at_once}) must be divisible by "
        "{pipeline_model_parallel_size} with virtual stages",
        lambda total, stages: total % at_once != 0 or total // at_once % stages == 0,
        "change --global-batch-size, or drop the virtual stages",
    )
