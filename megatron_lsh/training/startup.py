"""Before the first iteration: what is refused, what is printed, what is written down."""

from __future__ import annotations

import errno
import json
import os
import platform
from pathlib import Path

import torch
from torch import nn

import megatron_lsh
from megatron_lsh import ops
from megatron_lsh.checkpoint.inspection import CheckpointInfo, inspect
from megatron_lsh.checkpoint.lock import SaveLock
from megatron_lsh.checkpoint.manifest import write_atomically
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.config import Config
from megatron_lsh.config.serialize import describe, to_saved
from megatron_lsh.errors import CheckpointError, ConfigError
from megatron_lsh.moe.registry import DispatcherSpec, describe_rates, describe_restoration
from megatron_lsh.moe.registry import describe as describe_dispatcher
from megatron_lsh.parallel.agreement import exchange
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import num_local_parameters, num_parameters


def refuse_to_overwrite(cfg: CheckpointConfig) -> None:
    """Nothing is resumed or overwritten by accident: a --save folder with a run in it must be the --load folder too.

    Needs no process group: every rank looks for itself and finds the same.

    Raises:
        ConfigError: saying what was found, and how to resume it or to start again.
    """
    if cfg.save is None:
        return
    found = inspect(cfg.save)
    if not found:
        return
    if cfg.load is None:
        resume = f"to resume it, add --load {cfg.save}"
    elif not _same_folder(cfg.load, cfg.save):
        resume = (
            f"to resume it, give --load {cfg.save} (with --pretrained-checkpoint {cfg.load} that also works for the "
            "first start, when it is still empty)"
        )
    elif cfg.finetune:
        resume = "to resume it, drop --finetune, which starts at iteration 0 again"
    else:
        return
    raise ConfigError(
        f"--save {cfg.save} already holds a run: {_what(found)}; {resume}; to start anew, {_anew(cfg.save)}"
    )


def take_save_folder(cfg: Config, ctx: ParallelContext) -> SaveLock | None:
    """Rank 0's right to save in --save; None elsewhere, and for a run that saves nothing.

    Raises:
        CheckpointError: another run saves there, or the folder cannot be written.
    """
    save = cfg.checkpoint.save
    evaluates = cfg.training.skip_train and not cfg.checkpoint.moe_use_upcycling
    if ctx.rank != 0 or save is None or evaluates:
        return None
    try:
        return SaveLock(Path(save))
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"--save {save} cannot be used: {error}") from None


def _what(found: list[CheckpointInfo]) -> str:
    newest = next((info for info in found if info.tracked), found[0])
    total = newest.config.get("training", {}).get("train_iters")
    of = f" of {total}" if total else ""
    number = "one checkpoint" if len(found) == 1 else f"{len(found)} checkpoints"
    damage = "" if newest.valid else f" (damaged: {newest.problem})"
    return f"{number}, at iteration {newest.iteration}{of}{damage}"


def _anew(save: str) -> str:
    return f"give another --save or remove the folder (rm -r {save})"


def _same_folder(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def set_determinism(cfg: Config) -> None:
    """--deterministic-mode: only deterministic kernels, an error where there is none. Call before CUDA is used."""
    if cfg.training.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def introduce(cfg: Config, ctx: ParallelContext) -> None:
    """Print, on rank 0, versions, layout and configuration."""
    if ctx.rank != 0:
        return
    layout = ctx.layout
    device = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else _cpu()
    print(
        f"megatron_lsh {megatron_lsh.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {device}\n"
        f"ranks {layout.world_size}: "
        + (f"pipeline parallel {layout.pp} x " if layout.pp > 1 else "")
        + (f"context parallel {layout.cp} x " if layout.cp > 1 else "")
        + f"tensor parallel {layout.tp} x data parallel {layout.dp}; experts: expert parallel {layout.ep} x expert data "
        f"parallel {layout.edp}"
        + (", sequence parallel" if ctx.sequence_parallel else "")
        + (", sharded optimizer" if ctx.shard_optimizer else ""),
        *([ops.describe(ctx.device.type)] if cfg.moe.num_experts else []),
        describe(cfg),
        sep="\n",
        flush=True,
    )
    for notice in cfg.notices:
        print(f"note: {notice}", flush=True)


def _cpu() -> str:
    return f"CPU with {torch.get_num_threads()} thread(s) per rank"


def describe_dispatch(cfg: Config, ctx: ParallelContext) -> None:
    """Print, on rank 0, how rows cross the network where expert parallelism spans nodes, and what restoring them costs if it
    is much."""
    if cfg.moe.num_experts is None or ctx.rank != 0:
        return
    spec = DispatcherSpec.of(cfg.model, cfg.moe, cfg.lsh, ctx, layer=0)
    for line in (describe_dispatcher(spec), describe_restoration(spec), describe_rates(spec)):
        if line is not None:
            print(line, flush=True)


def describe_model(model: nn.Module, vocab_size: int | None, padded_vocab_size: int, ctx: ParallelContext) -> None:
    """Print, on rank 0, the number of parameters and the size of the vocabulary, if there is one. Collective."""
    total, local = sum(exchange(num_parameters(model), ctx.pp.process_group)), num_local_parameters(model)
    vocabulary = f"; vocabulary {vocab_size:,}, padded to {padded_vocab_size:,}" if padded_vocab_size else ""
    if ctx.rank == 0:
        print(f"parameters: {total:,} in all, {local:,} on rank 0{vocabulary}", flush=True)


def save_config(cfg: Config, ctx: ParallelContext) -> None:
    """Write config.json beside what the run leaves behind (--save, else the folder of its metrics). On rank 0.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = _run_folder(cfg)
    if ctx.rank != 0 or folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", (json.dumps(to_saved(cfg), indent=2) + "\n").encode())
    except OSError as error:
        if error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
        ):  # the one of before is still there, and checkpoints have their own
            print(f"WARNING: {folder / 'config.json'} could not be written ({error}): the run goes on", flush=True)
            return
        raise ConfigError(
            f"{folder} must be a folder that can be written, for config.json ({error}): change it"
        ) from error


def _run_folder(cfg: Config) -> Path | None:
    if cfg.checkpoint.save is not None and not cfg.training.skip_train:  # which would put its own in the run's place
        return Path(cfg.checkpoint.save)
    if cfg.logging.metrics_jsonl is not None:
        return Path(cfg.logging.metrics_jsonl).parent
    return Path(cfg.logging.tensorboard_dir) if cfg.logging.tensorboard_dir is not None else None
