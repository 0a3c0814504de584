"""--moe-use-upcycling: a run that starts from a dense checkpoint."""

from __future__ import annotations

import dataclasses
import os

from megatron_lsh.checkpoint.inspection import inspect
from megatron_lsh.config import Config
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.convert import Checks, load_native, save_native, upcycle
from megatron_lsh.parallel.agreement import together, unhurried_barrier
from megatron_lsh.parallel.context import ParallelContext


def start_from_dense(cfg: Config, ctx: ParallelContext) -> CheckpointConfig:
    """Convert the dense checkpoint into ``SAVE/release``, and return the settings that load that one. Collective.

    Does nothing without the flag, and nothing if --load and --save are one folder in which the run has begun already: the
    same command line then resumes it.

    Raises:
        CheckpointError: the checkpoint is not of a dense model, or does not fit the flags.
    """
    checkpoint = cfg.checkpoint
    if not checkpoint.moe_use_upcycling or checkpoint.save is None:
        return checkpoint
    save = checkpoint.save
    own = checkpoint.load is None or os.path.realpath(checkpoint.load) == os.path.realpath(save)
    begun = together(ctx, lambda: own and bool(inspect(save)))
    if not begun:
        source = checkpoint.pretrained_checkpoint if own else checkpoint.load
        wait = unhurried_barrier(ctx, "the upcycled checkpoint")

        def convert() -> None:
            try:
                if ctx.rank == 0:
                    _convert(cfg, str(source), save)
            finally:
                wait()

        together(ctx, convert)
    # --ckpt-step named an iteration of the dense run.
    return dataclasses.replace(checkpoint, load=save, ckpt_step=checkpoint.ckpt_step if begun else None)


def _convert(cfg: Config, source: str, save: str) -> None:
    dense = load_native(source, cfg.checkpoint.ckpt_step)
    model = upcycle(dense, cfg.moe, cfg.checkpoint.moe_upcycling_granularity, cfg.training.seed)
    for notice in model.notices:
        print(f"WARNING: {notice}", flush=True)
    print(f"upcycling {dense.what} to {cfg.moe.num_experts} experts in {save}/release", flush=True)
    save_native(model, save, checks=Checks(progress=True))
