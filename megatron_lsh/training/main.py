"""The body of the entry scripts: from a command line to a run, or to the description of one."""

from __future__ import annotations

import os
from collections.abc import Callable

from megatron_lsh.config import Config, assumed_world_size, validate
from megatron_lsh.families import Family, family_of
from megatron_lsh.observing.trackers import refuse_missing_writers
from megatron_lsh.parallel.launcher import place_of
from megatron_lsh.plan.dry_run import dry_run
from megatron_lsh.training.faults import launch
from megatron_lsh.training.startup import refuse_to_overwrite
from megatron_lsh.training.train import train


def main(parse: Callable[[], Config]) -> int:
    """Train as the command line says; returns the exit status.

    Args:
        parse: reads the command line, such as ``GPT.parse``; the class of what it returns says which family is trained.
    """
    return launch(lambda: configure(parse()), _run)


def configure(written: Config) -> tuple[Config, Family]:
    """The checked configuration and the family, with data that either depends on; nothing is started yet.

    Raises:
        ConfigError, DataError: for what can be known to be wrong before any process group exists.
    """
    world_size = assumed_world_size(written)
    cfg, family = validate(written, world_size), family_of(written)
    if cfg.training.dry_run:
        return cfg, family
    refuse_missing_writers(cfg.logging)
    if not cfg.training.skip_train:
        refuse_to_overwrite(cfg.checkpoint)
    return (cfg, family) if family.prepare is None else family.prepare(family, written, world_size)


def _run(configured: tuple[Config, Family]) -> None:
    """Describe the run, or do it."""
    cfg, family = configured
    if not cfg.training.dry_run:
        train(cfg, family)
    elif place_of(os.environ).rank == 0:
        print(dry_run(cfg))
