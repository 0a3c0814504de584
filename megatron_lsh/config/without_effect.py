"""Settings that a command line may give where nothing reads them; each is told at start-up."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config


class _Reader(NamedTuple):
    """What reads some settings, if it is there."""

    there: Callable[[Config], bool]
    names: tuple[str, ...]


_WITHOUT = MappingProxyType({
    "without --save": _Reader(
        lambda cfg: cfg.checkpoint.save is not None,
        ("save_interval", "save_retain_interval", "async_save", "save_optim", "save_rng", "log_progress"),
    ),
    "without --load": _Reader(lambda cfg: cfg.checkpoint.load is not None, ("load_optim", "load_rng")),
    "without --dry-run": _Reader(lambda cfg: cfg.training.dry_run, ("world_size", "dry_run_json")),
    "without --lr-decay-style WSD": _Reader(
        lambda cfg: cfg.optimizer.lr_decay_style == "WSD",
        ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style"),
    ),
    "without --fp16": _Reader(
        lambda cfg: cfg.precision.fp16,
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    ),
    "beside --loss-scale, which is fixed": _Reader(
        lambda cfg: cfg.precision.loss_scale is None or not cfg.precision.fp16,
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    ),
    "without --lsh-probe-interval": _Reader(lambda cfg: cfg.lsh.lsh_probe_interval is not None, ("lsh_probe_warn",)),
    "without --lsh-target-energy": _Reader(lambda cfg: cfg.lsh.lsh_target_energy is not None, ("lsh_least_rate",)),
    "without --moe-use-upcycling": _Reader(
        lambda cfg: cfg.checkpoint.moe_use_upcycling, ("moe_upcycling_granularity",)
    ),
    "without --wandb-project": _Reader(
        lambda cfg: cfg.logging.wandb_project is not None, ("wandb_exp_name", "wandb_save_dir", "wandb_entity")
    ),
    "with --device cpu": _Reader(
        lambda cfg: cfg.parallel.device != "cpu", ("memory_snapshot_path", "record_memory_history")
    ),
})  # fmt: skip


def tell_what_nothing_reads(cfg: Config, check: Checker) -> None:
    """One notice for each reader that is not there."""
    for words, reader in _WITHOUT.items():
        if reader.there(cfg):
            continue
        given = [
            setting.flag
            for name in reader.names
            if (setting := check.settings[name]).get(cfg) != setting.default and name not in cfg.derived
        ]
        if given:
            check.notice(f"no effect {words}: {', '.join(given)}")
