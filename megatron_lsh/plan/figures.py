"""What the planner's page plots: step time against the network's speed, and against ranks. All of it is a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_lsh.families import family_of
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.cluster import Cluster
from megatron_lsh.plan.counting import ParameterCounts
from megatron_lsh.plan.search import SWEEP, Candidate
from megatron_lsh.plan.step_time import StepCost, step_cost
from megatron_lsh.plan.table import dispatch_words, kind_words, layout_words

MOST_RANKS = 16384
MOST_CURVES = 6
_POINTS = 49

Curves = dict[str, list[tuple[float, float]]]


def kinds(candidates: Sequence[Candidate], most: int = MOST_CURVES) -> list[Candidate]:
    """The fastest one of each dispatch, from the fastest on."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(kind_words(candidate), candidate)
    return list(found.values())[:most]


def by_bandwidth(candidates: Sequence[Candidate]) -> Curves:
    """ms per step by Gbit/s of a node: of every dispatch, under whichever of its layouts is the fastest there."""
    here = candidates[0].cost.cluster.across.bandwidth * 8e-9
    steps = [SWEEP ** (2 * place / (_POINTS - 1) - 1) for place in range(_POINTS)]
    curves: Curves = {}
    for kind in kinds(candidates):
        alike = [candidate for candidate in candidates if kind_words(candidate) == kind_words(kind)][:200]
        curves[kind_words(kind)] = [
            (here * faster, 1e3 * min(candidate.cost.at(faster).total for candidate in alike)) for faster in steps
        ]
    return curves


def by_ranks(candidates: Sequence[Candidate], most: int = MOST_RANKS) -> Curves:
    """ms per step by ranks: the layout stays, data parallelism and the global batch grow with the nodes."""
    curves: Curves = {}
    for kind in kinds(candidates):
        ranks, points = kind.layout.world_size, []
        factor = 1
        while factor == 1 or ranks * factor <= most:
            points.append((float(ranks * factor), 1e3 * grown(kind, factor).at().total))
            factor *= 2
        curves[f"{dispatch_words(kind)} ({layout_words(kind)})"] = points
    return curves


def grown(candidate: Candidate, factor: int) -> StepCost:
    """A step of so many times the nodes and the global batch."""
    cfg, cluster = candidate.cfg, candidate.cost.cluster
    training = dataclasses.replace(cfg.training, global_batch_size=(cfg.training.global_batch_size or 1) * factor)
    cfg = dataclasses.replace(cfg, training=training)
    larger: Cluster = dataclasses.replace(cluster, nodes=cluster.nodes * factor)
    layout = ParallelLayout.from_config(cfg.parallel, larger.ranks)
    counts: ParameterCounts = candidate.counts
    return step_cost(family_of(cfg), cfg, larger, layout, counts, candidate.vocab_size)
