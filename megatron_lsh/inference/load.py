"""A language model and the weights of a checkpoint, without anything that only training needs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

from megatron_lsh.checkpoint import CheckpointManager, TrainingState
from megatron_lsh.checkpoint.manifest import MANIFEST
from megatron_lsh.config import CheckpointConfig, Config, padded_vocab_size, required, to_dict
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext

_TIMEOUT = timedelta(minutes=10)


def settings_of_inference(cfg: Config) -> Config:
    """A copy of the settings with which no token is dropped, each goes to the experts that the router likes best, and
    nothing is asked of the ranks that the training's had, such as nodes of several."""
    cfg = copy.deepcopy(cfg)
    cfg.moe.moe_expert_capacity_factor = None
    cfg.moe.moe_router_force_load_balancing = False
    cfg.lsh.lsh_scope, cfg.moe.moe_node_deduplication, cfg.moe.moe_overlap_chunks = None, "auto", 1
    return cfg


def build_model(cfg: Config, ctx: ParallelContext) -> GPTModel:
    """The model with fresh fp32 weights, in evaluation mode. Raises ValueError if `cfg` has no size of the vocabulary."""
    padded = padded_vocab_size(required(cfg.model.vocab_size), cfg.model.make_vocab_size_divisible_by, ctx.tp.size)
    return GPTModel(settings_of_inference(cfg), padded, ctx, MoETelemetry(ctx.device)).eval()


def load_model(
    cfg: Config, folder: Path, step: int | None, ctx: ParallelContext, vocabulary: Collection[str]
) -> GPTModel:
    """The model with a checkpoint's weights in fp32, cut over the ranks as `ctx` says. Collective.

    Args:
        folder: a --save folder, or one checkpoint in it; the newest of the folder, or that of iteration `step`.
        vocabulary: names of the parameters with a row for each token, which may be padded otherwise in the checkpoint.

    Raises CheckpointError: there is none, it is damaged, or it is of another model.
    """
    model = build_model(cfg, ctx)
    for parameter in model.parameters():
        parameter.detach().zero_()  # rows that pad the vocabulary are in no checkpoint of another padding
    if (folder / MANIFEST).exists():  # the checkpoint itself
        step = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else step
        folder = folder.parent
    manager = CheckpointManager(
        CheckpointConfig(load=str(folder), ckpt_step=step, finetune=True),
        ctx,
        timeout=_TIMEOUT,
        notify=lambda text: print(text, file=sys.stderr),
    )
    names = [name for name, _ in model.named_parameters() if name in vocabulary]
    rows = dict.fromkeys(names, required(cfg.model.vocab_size))
    manager.load(TrainingState(model=model, config=to_dict(cfg)["config"], padded_rows=rows))
    return model
