"""Which layout and which dispatch take the least time for a step: every combination that training would accept is timed.

What a command line fixes stays as it is: only settings that it does not name are searched. Every layout goes through
``config.validate``, as at the start of a run; memory is the dry run's. Recomputation is tried where a layout does not fit
without, because it never saves time.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lsh.config import Config, padded_vocab_size, validate
from megatron_lsh.config.settings import settings_of, spellings_of
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import Family, family_of
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.cluster import Cluster
from megatron_lsh.plan.counting import ParameterCounts, parameter_counts
from megatron_lsh.plan.dry_run import vocabulary_of
from megatron_lsh.plan.memory import estimate_memory
from megatron_lsh.plan.step_time import StepCost, step_cost
from megatron_lsh.plan.traffic import spread

LARGEST_MICRO_BATCH = 64
SWEEP = 64.0
"""how many times slower and faster networks are looked at"""
_GRID = 49

Settings = tuple[tuple[str, Any], ...]
_PLAIN: Settings = ()


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Attributes:
        cfg: as parsed, with the settings that stay.
        fixed: names of settings that the command line names.
        rates: values of --lsh-target-rate to try; none tries exact dispatch alone.
        wires: values of --lsh-wire-dtype to try; None for the model's numbers.
        chunks: pieces in which rows may travel.
    """

    cfg: Config
    fixed: frozenset[str]
    rates: tuple[str, ...] = ("0.2",)
    wires: tuple[str | None, ...] = (None,)
    chunks: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    """A layout with a dispatch that training accepts and memory holds.

    Attributes:
        settings: those that differ from the command line's, by name.
        memory: bytes of the fullest rank.
    """

    settings: Settings
    cfg: Config
    layout: ParallelLayout
    cost: StepCost
    counts: ParameterCounts
    vocab_size: int
    memory: float
    seconds: float
    pressed: bool
    """whether memory made it recompute"""

    @property
    def exact(self) -> bool:
        return self.cfg.moe.moe_token_dispatcher_type not in ("lsh", "auto") and self.cfg.lsh.lsh_wire_dtype is None

    @property
    def limit(self) -> str:
        """What most of the time goes to; and memory, where it made the layout slower or is nearly full."""
        tight = self.pressed or self.memory > 0.9 * self.cost.cluster.memory
        return self.cost.at().limit + (", memory" if tight else "")

    def flags(self) -> list[str]:
        """The words that a command line needs for its settings."""
        known = settings_of(type(self.cfg))
        words: list[str] = []
        for name, value in self.settings:
            if known[name].kind is bool:
                words += [known[name].flag] if value else [known[name].flag, "false"]
            else:
                values = value if isinstance(value, list | tuple) else [value]
                words += [known[name].flag, *(f"{number:g}" if isinstance(number, float) else str(number)
                                              for number in values)]  # fmt: skip
        return words


@dataclass(frozen=True)
class Answer:
    """Candidates from the fastest to the slowest, and how many were refused by training's checks, and by memory."""

    candidates: tuple[Candidate, ...]
    refused: int
    too_large: int
    least_memory: float
    """bytes of the smallest layout that training accepts"""


def named_in(words: Sequence[str], config_class: type[Config]) -> frozenset[str]:
    """Settings that a command line names, in whatever spelling."""
    spellings = spellings_of(settings_of(config_class))
    keys = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    return frozenset(spellings[key].setting.name for key in keys if key in spellings)


def search(question: Question, cluster: Cluster, tell: Callable[[str], None] = lambda line: None) -> Answer:
    """All candidates.

    Raises:
        ConfigError: training would accept no layout (with what it says of the first), or none fits into memory.
    """
    first: ConfigError | None = None
    found: list[Candidate] = []
    refused = too_large = 0
    least = math.inf
    pricing = _Pricing(cluster)
    for number, sizes in enumerate(_layouts(question, cluster), 1):
        if number % 50 == 0:
            tell(f"{number} layouts looked at, {len(found)} candidates")
        pressed, waiting = False, list[Settings]()
        for recompute in _recomputations(question):
            settings = {**sizes, **recompute}
            try:
                cfg = _validated(question.cfg, settings, cluster.ranks)
                held, layout, memory = pricing.memory(cfg)
            except ConfigError as error:
                first, refused = first or error, refused + 1
                break
            least = min(least, memory)
            if memory > cluster.memory:
                too_large, pressed = too_large + 1, True
                continue
            ways = waiting or list(_dispatches(question, layout, cluster))
            waiting = []
            for way in ways:
                try:
                    dispatch = pricing.checked(question.cfg, settings, way, layout)
                    candidate = pricing.candidate(cfg, {**settings, **dict(way)}, dispatch, held, layout, pressed)
                except ConfigError as error:
                    first, refused = first or error, refused + 1
                    continue
                if candidate.memory > cluster.memory:
                    waiting.append(way)
                else:
                    found.append(candidate)
            if not waiting:
                break
            too_large, pressed = too_large + 1, True
    if not found and too_large:
        raise ConfigError(
            f"memory_gib ({cluster.memory / 2**30:g}) must hold a rank, and the smallest layout takes {least / 2**30:.1f} "
            "GiB: give more nodes, or a smaller --micro-batch-size, or drop flags that fix the layout"
        )
    if not found:
        raise first or ConfigError(f"no layout of {cluster.ranks} ranks is left to try: drop flags that fix the layout")
    found.sort(key=lambda candidate: candidate.seconds)
    return Answer(tuple(_checked(found, question, cluster)), refused, too_large, least)


def changes(
    candidates: Sequence[Candidate], best: Candidate | None = None, *, most: float = SWEEP
) -> list[tuple[float, Candidate]]:
    """Where the choice changes: (how many times as fast the network is there, the candidate that is best beyond).

    From the slowest network looked at to the fastest; the first entry is (1 / most, the best there).
    """
    grid = [most ** (2 * place / (_GRID - 1) - 1) for place in range(_GRID)]
    times = [[candidate.cost.at(faster).total for candidate in candidates] for faster in grid]

    def best_at(row: Sequence[float]) -> int:
        return min(range(len(row)), key=row.__getitem__)

    found = [(grid[0], candidates[best_at(times[0])])]
    for low, high, row in zip(grid, grid[1:], times[1:], strict=False):
        now = candidates[best_at(row)]
        before = found[-1][1]
        if now is before:
            continue
        for _ in range(30):  # where the two cross
            middle = math.sqrt(low * high)
            if before.cost.at(middle).total <= now.cost.at(middle).total:
                low = middle
            else:
                high = middle
        found.append((high, now))
    return found


class _Pricing:
    """What candidates share: parameters counted once for all layouts that hold the same."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._counts: dict[tuple[object, ...], ParameterCounts] = {}
        self._vocabularies: dict[type, int] = {}
        self._ways: dict[tuple[object, ...], Settings | str] = {}

    def _parts(self, cfg: Config) -> tuple[Family, ParallelLayout, ParameterCounts, int]:
        family = family_of(cfg)
        layout = ParallelLayout.from_config(cfg.parallel, self._cluster.ranks)
        if family.config not in self._vocabularies:
            self._vocabularies[family.config] = vocabulary_of(family, cfg, layout).size
        size = self._vocabularies[family.config]
        padded = padded_vocab_size(size, cfg.model.make_vocab_size_divisible_by, layout.tp) if size else 0
        parallel = cfg.parallel
        key = (layout.tp, layout.ep, layout.pp, parallel.num_virtual_stages_per_pipeline_rank)
        if key not in self._counts:
            self._counts[key] = parameter_counts(family, cfg, padded, layout)
        return family, layout, self._counts[key], padded

    def memory(self, cfg: Config) -> tuple[tuple[Family, ParameterCounts, int], ParallelLayout, float]:
        """Of the fullest rank, with exact dispatch or that of the command line. Raises ConfigError."""
        family, layout, counts, padded = self._parts(cfg)
        total, micro = cfg.training.global_batch_size or 1, cfg.training.micro_batch_size or 1
        micro_batches = max(total // (micro * layout.dp), 1)
        estimates = estimate_memory(family, cfg, counts, layout, padded, micro_batches)
        return (family, counts, padded), layout, max(estimate.total for estimate in estimates)

    def checked(self, cfg: Config, settings: dict[str, Any], way: Settings, layout: ParallelLayout) -> Settings:
        """The settings of a dispatch in training's own spelling (a rate by layer). Raises ConfigError where it refuses."""
        key = (way, layout.tp, layout.pp, layout.cp, layout.ep)
        if key not in self._ways:
            try:
                accepted = _validated(cfg, {**settings, **dict(way)}, self._cluster.ranks)
                known = settings_of(type(accepted))
                self._ways[key] = tuple((name, known[name].get(accepted)) for name, _ in way)
            except ConfigError as error:
                self._ways[key] = str(error)  # the exception itself would collect the frames of everyone who raises it
        found = self._ways[key]
        if isinstance(found, str):
            raise ConfigError(found)
        return found

    def candidate(
        self,
        cfg: Config,
        settings: dict[str, Any],
        dispatch: Settings,
        held: tuple[Family, ParameterCounts, int],
        layout: ParallelLayout,
        pressed: bool,
    ) -> Candidate:
        """Raises ConfigError for a dispatch that cannot be there."""
        family, counts, padded = held
        cfg = _with(cfg, dict(dispatch))
        cost = step_cost(family, cfg, self._cluster, layout, counts, padded)
        memory = self.memory(cfg)[2]
        return Candidate(tuple(settings.items()), cfg, layout, cost, counts, padded, memory, cost.at().total, pressed)


def _with(cfg: Config, values: dict[str, Any]) -> Config:
    """A copy with other settings, which have been checked."""
    known = settings_of(type(cfg))
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(known[name].section, {})[name] = value
    parts = {section: dataclasses.replace(getattr(cfg, section), **named) for section, named in sections.items()}
    return dataclasses.replace(cfg, **parts)


def _validated(cfg: Config, settings: dict[str, Any], ranks: int) -> Config:
    cfg = copy.deepcopy(cfg)
    known = settings_of(type(cfg))
    for name, value in {**settings, "dry_run": True, "world_size": ranks}.items():
        known[name].set(cfg, value)
    return validate(cfg, ranks)


def _checked(found: Sequence[Candidate], question: Question, cluster: Cluster) -> Iterator[Candidate]:
    """The candidates; the first ones again as a whole, by the checks of training."""
    left = 20
    for candidate in found:
        if left:
            try:
                _validated(question.cfg, dict(candidate.settings), cluster.ranks)
            except ConfigError:
                continue
            left -= 1
        yield candidate


def _layouts(question: Question, cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Sizes that divide the ranks. Groups of tensor-parallel ranks stay inside nodes."""
    cfg, fixed, ranks = question.cfg, question.fixed, cluster.ranks
    layers, experts = sum(cfg.layers_of_stacks()) or 1, cfg.moe.num_experts

    def choices(name: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        return [{}] if name in fixed else [{name: value} for value in values]

    def divisors(number: int, most: int) -> list[int]:
        return [n for n in range(1, min(number, most) + 1) if number % n == 0]

    tensors = choices(
        "tensor_model_parallel_size", divisors(cluster.ranks_per_node, cfg.model.num_attention_heads or 1)
    )
    pipelines = choices("pipeline_model_parallel_size",
                        [1] if type(cfg).why_no_pipeline else divisors(ranks, layers))  # fmt: skip
    shares = [1] if type(cfg).why_no_context_parallel else [n for n in (1, 2, 4, 8) if ranks % n == 0]
    contexts = choices("context_parallel_size", shares)
    spreads = choices("expert_model_parallel_size",
                      [1] if experts is None else [n for n in divisors(experts, ranks) if ranks % n == 0])  # fmt: skip
    micro = choices("micro_batch_size", [2**n for n in range(LARGEST_MICRO_BATCH.bit_length())])
    sharded = choices("use_distributed_optimizer", [False, True])
    total = cfg.training.global_batch_size or 1
    for tensor in tensors:
        for pipeline in pipelines:
            for context in contexts:
                part = {**tensor, **pipeline, **context}
                shared = math.prod(part.get(name, getattr(cfg.parallel, name)) for name in (
                    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"))  # fmt: skip
                if shared > ranks or ranks % shared or total % (ranks // shared):
                    continue
                stages = part.get("pipeline_model_parallel_size", cfg.parallel.pipeline_model_parallel_size)
                for size in micro:
                    # Ranks of one sequence are worth their keys' way only where there is but one to share.
                    several = size.get("micro_batch_size", 1) > 1
                    if (several and context.get("context_parallel_size", 1) > 1) or (
                        size and total % (size["micro_batch_size"] * (ranks // shared))
                    ):
                        continue
                    for experts_over in spreads:
                        if ranks // stages % experts_over.get("expert_model_parallel_size", 1):
                            continue
                        for shard in sharded:
                            yield {**part, **size, **experts_over, **shard}


def _recomputations(question: Question) -> list[dict[str, Any]]:
    """From the fastest to the smallest."""
    if question.fixed & {"recompute_granularity", "recompute_activations", "recompute_modules", "moe_layer_recompute"}:
        return [{}]
    return [{}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"}]


def _dispatches(question: Question, layout: ParallelLayout, cluster: Cluster) -> Iterator[Settings]:
    """Ways of the rows. Which of them the layout can have, the registry of dispatchers says."""
    fixed, moe = question.fixed, question.cfg.moe
    if moe.num_experts is None or layout.ep == 1 or "moe_token_dispatcher_type" in fixed:
        kinds: list[Settings] = [_PLAIN]
    else:
        spans = spread(layout, cluster.ranks_per_node, "ep").nodes > 1
        ways = [(("moe_node_deduplication", way),) for way in (("off", "on") if spans else ("off",))]
        kinds = [
            (("moe_token_dispatcher_type", "alltoall"), *way)
            for way in ([()] if "moe_node_deduplication" in fixed else ways)
        ]
        scopes = [()] if "lsh_scope" in fixed else [(("lsh_scope", scope),) for scope in ("rank", "node")]
        kinds += [
            (("moe_token_dispatcher_type", "lsh"), ("lsh_target_rate", rate), *scope)
            for rate in question.rates
            for scope in scopes
        ]
    travels = moe.num_experts is not None and layout.ep > 1
    wires = question.wires if travels and "lsh_wire_dtype" not in fixed else (None,)
    chunks = question.chunks if travels and "moe_overlap_chunks" not in fixed else (1,)
    for kind in kinds:
        for wire in wires:
            for pieces in chunks:
                yield (
                    *kind,
                    *((("lsh_wire_dtype", wire),) if wire is not None else ()),
                    *((("moe_overlap_chunks", pieces),) if pieces > 1 else ()),
                )
