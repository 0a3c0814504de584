"""Several ways of dispatching for one model, exchanged between steps: for measurements that must be interleaved."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.data.loader import BatchIterator
from megatron_lsh.families import GPT, Family
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.schedule import Scheduled
from megatron_lsh.training.primitives import dispatchers
from megatron_lsh.training.run import Run


@dataclass(frozen=True)
class Variant:
    """Which rows travel, and in which numbers (`wire`: None for those of the model).

    `rate`: the part of the rows that LSH sends; None for exact dispatch: a row per (token, expert), or with `deduplicated`
    one per (token, node).
    """

    rate: float | None = None
    wire: str | None = None
    deduplicated: bool = False
    scope: str | None = None
    """``--lsh-scope``"""
    chunks: int = 1
    """pieces in which rows travel (``--moe-overlap-chunks``)"""

    @property
    def name(self) -> str:
        rows = (
            f"LSH {100 * self.rate:g}%" if self.rate is not None else "de-duplicated" if self.deduplicated else "exact"
        )
        rows = rows if self.scope is None else f"{rows} per {self.scope}"
        rows = rows if self.wire is None else f"{rows}, {self.wire}"
        return rows if self.chunks == 1 else f"{rows}, {self.chunks} pieces"


class Bench:
    """A training run whose dispatcher can be exchanged. The model, its data and its optimizer stay."""

    def __init__(self, run: Run, batches: BatchIterator) -> None:
        self.run = run
        self._batches = batches
        self._iteration = 0
        self._layers = [module for module in run.model.modules() if isinstance(module, MoELayer)]
        self._dispatchers: dict[Variant, list[Scheduled]] = {}

    def use(self, variant: Variant) -> None:
        """Dispatch like this from now on."""
        if variant not in self._dispatchers:
            self._dispatchers[variant] = self._build(variant)
        for layer, dispatcher in zip(self._layers, self._dispatchers[variant], strict=True):
            layer.dispatcher = dispatcher

    def _build(self, variant: Variant) -> list[Scheduled]:
        cfg = self.run.cfg
        lsh = dataclasses.replace(
            cfg.lsh, lsh_wire_dtype=variant.wire, lsh_target_rate=str(variant.rate or 1.0), lsh_scope=variant.scope
        )
        moe = dataclasses.replace(
            cfg.moe,
            moe_token_dispatcher_type="alltoall" if variant.rate is None else "lsh",
            moe_node_deduplication="on" if variant.deduplicated else "off",
            moe_overlap_chunks=variant.chunks,
        )
        return dispatchers(self.run, moe, lsh)

    def step(self) -> dict[str, float]:
        """One training iteration: the wall time of the slowest rank, and what the MoE layers spent it on (mean over the
        ranks). The same on every rank, so that ranks can act on it."""
        world = self.run.ctx.world
        if world.size > 1:
            dist.barrier(group=world.process_group)
        started = time.perf_counter()
        self.run.step(self._batches, self._iteration, stop=False)
        step_ms = torch.tensor(1e3 * (time.perf_counter() - started), dtype=torch.float64)
        self._iteration += 1
        if world.size > 1:
            dist.all_reduce(step_ms, dist.ReduceOp.MAX, group=world.process_group)
        return {"step_ms": float(step_ms)} | self.collect()

    def collect(self) -> dict[str, float]:
        """Times (ms per rank) and bytes (sum over ranks) of the MoE layers since the last call."""
        layers = self.run.telemetry.collect(self.run.ctx, iterations=1)
        names = {
            "alltoall_ms": "alltoall_time_ms",
            "experts_ms": "experts_time_ms",
            "lsh_ms": "lsh_time_ms",
            "wire_ms": "wire_time_ms",
            "bytes": "alltoall_bytes",
            "bytes_network": "alltoall_bytes_network",
            "bytes_uncompressed": "alltoall_bytes_uncompressed",
        }
        found = {ours: sum(layer[gauge] or 0.0 for layer in layers) for ours, gauge in names.items()}
        rates = [layer["expert_rows_rate"] or layer["lsh_compression_rate"] or 1.0 for layer in layers]
        return found | {"expert_rows": sum(rates) / len(rates)}


def configure(flags: list[Any], ranks: int) -> Config:
    """The checked configuration of a GPT's run that saves and writes nothing."""
    return prepared(flags, ranks, GPT)[0]


def prepared(flags: list[Any], ranks: int, family: Family) -> tuple[Any, Family]:
    """The same of any family, and the family as the data make it."""
    length = ["--train-iters", "1000000", "--eval-iters", "0", "--lr", "1e-4", "--lr-decay-style", "constant"]
    written = parse_args([*map(str, flags), *length], family.config)
    if family.prepare is not None:
        return family.prepare(family, written, ranks)
    return validate(written, ranks), family
