"""What a cluster file says: nodes, links, and how fast a rank computes (``tools/plan.py --cluster FILE``).

YAML or JSON. docs/instruments.md lists the keys; ``SECTIONS`` below has their rules. A file may ``include: FILE``, such as
the primitives that ``tools/profile_alltoall.py --primitives-out`` measured; what it says itself wins.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from megatron_lsh.config.config_file import read_document
from megatron_lsh.config.flag import Bounds
from megatron_lsh.config.settings import shown, to_float, to_int, to_str
from megatron_lsh.errors import ConfigError

Points = tuple[tuple[float, float], ...]
#: What ranks do on a link: an all-to-all of all of them; one among the ranks of a place on their nodes, the middle hop of
#: dispatch in two levels; a reduction or gathering in a ring; a send from one pipeline stage to the next.
Kind = Literal["alltoall", "hop", "reduction", "send"]
_MOST_POINTS = 100
_MOST_INCLUDED = 8


@dataclass(frozen=True)
class Rate:
    """A speed that depends on a size: straight between the points over the size's logarithm, constant beyond the ends."""

    points: Points

    def at(self, size: float) -> float:
        sizes = [x for x, _ in self.points]
        place = bisect_right(sizes, size)
        if place in (0, len(sizes)):
            return self.points[min(place, len(sizes) - 1)][1]
        (x0, y0), (x1, y1) = self.points[place - 1 : place + 1]
        return y0 + (y1 - y0) * math.log(size / x0) / math.log(x1 / x0)


@dataclass(frozen=True)
class Link:
    """How long an all-to-all takes by what it sends. Straight between the points, and on beyond the last two.

    Attributes:
        points: (bytes that one sender sends in all, seconds); of an idle call, and rising.
        ranks: senders that took part when they were measured. With more, the time of the smallest call grows by the
            logarithm, as that of collectives does that take log2 steps (Thakur et al. 2005).
        speeds: how fast the other kinds of calls send, as a share of the all-to-all's speed; 1 for those not named.
        measured: bytes up to which it was measured; 0 for figures of a datasheet.
    """

    points: Points
    ranks: int = 2
    speeds: Mapping[Kind, float] = field(default_factory=dict)
    measured: float = 0.0

    @classmethod
    def of_curve(cls, curve: Sequence[Sequence[float]], ranks: int, speeds: Mapping[Kind, float] | None = None) -> Link:
        """Of measured all-to-alls: [bytes, microseconds], rising."""
        return cls(tuple((x, y * 1e-6) for x, y in curve), ranks, speeds or {}, curve[-1][0])

    def seconds(self, size: float, ranks: int, faster: float = 1.0, kind: Kind = "alltoall") -> float:
        """Of one call in which each of `ranks` senders sends `size` bytes, on links `faster` times as fast."""
        if ranks < 2 or size <= 0:
            return 0.0
        start = self.points[0][1]
        steps = 1.0 if kind == "send" else max(math.log2(ranks) / math.log2(max(self.ranks, 2)), 1.0)
        moving = (self._at(size) - start) / faster
        return start * steps * (2 if kind == "reduction" else 1) + moving / self.speeds.get(kind, 1.0)

    def _at(self, size: float) -> float:
        sizes = [x for x, _ in self.points]
        place = min(max(bisect_right(sizes, size), 1), len(sizes) - 1)
        (x0, y0), (x1, y1) = self.points[place - 1 : place + 1]
        return y0 + (y1 - y0) * max(size - x0, 0.0) / (x1 - x0)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of large calls."""
        (x0, y0), (x1, y1) = self.points[-2:]
        return (x1 - x0) / (y1 - y0)


@dataclass(frozen=True)
class Cluster:
    """Speeds are of one rank while all ranks are busy; times in seconds, sizes in bytes."""

    name: str
    nodes: int
    ranks_per_node: int
    memory: float
    """bytes that a rank may use"""
    dense: Rate
    """FLOP/s outside the routed experts, by tokens of a rank's micro-batch"""
    grouped: Rate
    """FLOP/s of the routed experts, by rows of an expert in one call"""
    inside: Link
    """inside a node, by bytes of a rank"""
    across: Link
    """between nodes, by bytes of a node"""
    parameters_per_second: float = math.inf
    """that the optimizer updates"""
    step_seconds: float = 0.0
    """of a step beside everything else"""
    ranks_per_processor: float = 1.0
    """ranks that share a processor, and leave it to one another where they wait"""
    oversubscription: float = 1.0
    nodes_per_switch: int | None = None
    """nodes between which nothing is oversubscribed"""
    lsh_row_seconds: float = 0.0
    lsh_flops: float = math.inf
    deduplicated_row_seconds: float = 0.0
    node_row_seconds: float = 0.0
    casting: float = math.inf
    """bytes per second of turning rows into bf16 or fp32, or back"""
    coding: float = math.inf
    """the same of numbers of at most 8 bits with their scales"""
    hidden_reduction: float = 0.0
    """share of the backward pass behind which gradients are reduced"""
    slowdown: float = 1.0
    """of computing while something travels"""
    imbalance: float = 1.0
    """rows of the busiest rank over the mean"""
    source: str = "datasheet"
    networked: bool = True
    """whether links between nodes are known"""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def across_seconds(self, size: float, nodes: int, faster: float = 1.0, kind: Kind = "alltoall") -> float:
        """As `Link.seconds`, of a node; what leaves a switch is oversubscribed."""
        near = self.nodes_per_switch or 1
        if nodes > near and self.oversubscription > 1.0:
            # Rings and pipelines pass each switch's uplinks once, however many nodes there are; all of an all-to-all but
            # what is for the near goes up.
            leaving = 1.0 / near if kind in ("reduction", "send") else (nodes - near) / max(nodes - 1, 1)
            size *= max(1.0, leaving * self.oversubscription)
        return self.across.seconds(size, nodes, faster, kind)


class Key(NamedTuple):
    """What may stand under a key: a number within bounds, a text, or a curve of such numbers."""

    convert: Callable[[Any], Any]
    bounds: Bounds = Bounds()
    default: Any = None
    required: bool = False
    curve: bool = False
    choices: tuple[str, ...] = ()


_POSITIVE, _SIZE = Bounds(above=0, at_most=1e15), Bounds(at_least=1, at_most=2**20)
_SHARE = Bounds(above=0, at_most=10)

#: Every key of a cluster file by its section; "" is the top.
SECTIONS: Mapping[str, Mapping[str, Key]] = MappingProxyType({
    "": {
        "name": Key(to_str, default="cluster"),
        "source": Key(to_str, default="datasheet", choices=("datasheet", "measured")),
        "nodes": Key(to_int, _SIZE, required=True),
        "ranks_per_node": Key(to_int, _SIZE, required=True),
        "memory_gib": Key(to_float, _POSITIVE, required=True),
    },
    "compute": {
        "dense_tflops": Key(to_float, _POSITIVE, required=True, curve=True),
        "grouped_tflops": Key(to_float, _POSITIVE, required=True, curve=True),
        "optimizer_gparams_per_s": Key(to_float, _POSITIVE),
        "step_ms": Key(to_float, Bounds(at_least=0, at_most=1e9), 0.0),
        "ranks_per_processor": Key(to_float, Bounds(at_least=1, at_most=1024), 1.0),
    },
    "inside": {
        "gbit_per_s": Key(to_float, _POSITIVE),
        "latency_us": Key(to_float, Bounds(at_least=0, at_most=1e9)),
        "alltoall_us": Key(to_float, _POSITIVE, curve=True),
        "ranks": Key(to_int, Bounds(at_least=2, at_most=2**20), 2),
        "reduction_efficiency": Key(to_float, _SHARE, 1.0),
        "send_efficiency": Key(to_float, _SHARE, 1.0),
    },
    "lsh": {
        "row_ns": Key(to_float, Bounds(at_least=0, at_most=1e12), 0.0),
        "tflops": Key(to_float, _POSITIVE),
    },
    "dispatch": {
        "deduplicated_row_ns": Key(to_float, Bounds(at_least=0, at_most=1e12), 0.0),
        "node_row_ns": Key(to_float, Bounds(at_least=0, at_most=1e12), 0.0),
        "casting_gb_per_s": Key(to_float, _POSITIVE),
        "coding_gb_per_s": Key(to_float, _POSITIVE),
    },
    "overlap": {
        "hidden_reduction": Key(to_float, Bounds(at_least=0, at_most=1), 0.0),
        "slowdown": Key(to_float, Bounds(at_least=1, at_most=1e3), 1.0),
    },
    "routing": {"max_over_mean": Key(to_float, Bounds(at_least=1, at_most=1e6), 1.0)},
})  # fmt: skip
_ACROSS = MappingProxyType({
    **SECTIONS["inside"],
    "hop_efficiency": Key(to_float, _SHARE, 1.0),
    "nics_per_node": Key(to_int, _SIZE, 1),
    "oversubscription": Key(to_float, Bounds(at_least=1, at_most=1e6), 1.0),
    "nodes_per_switch": Key(to_int, _SIZE),
})  # fmt: skip


def read_cluster(path: Path, nodes: int | None = None) -> Cluster:
    """The cluster that a file describes; with `nodes`, of so many nodes.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of a wrong type or out of bounds, or one that is
            missing; with the value, the rule and the fix.
    """
    return cluster_of(_merged(path, ()), str(path), nodes)


def cluster_of(document: Mapping[str, Any], path: str, nodes: int | None = None) -> Cluster:
    """The cluster of a document's values; `path` names it in errors. Raises ConfigError."""
    reader = _Reader(path)
    sections = {**SECTIONS, "across": _ACROSS}
    reader.unknown("", document, [*SECTIONS[""], *filter(None, sections)])
    values = {name: reader.section(name, document if not name else document.get(name), keys, sections)
              for name, keys in sections.items()}  # fmt: skip
    links = {name: reader.link(name, values[name], given=name in document) for name in ("inside", "across")}
    top, compute, across = values[""], values["compute"], values["across"]
    if not reader.problems:
        for name, count in (("across", nodes or top["nodes"]), ("inside", top["ranks_per_node"])):
            if count > 1 and name not in document:
                reader.problem(
                    name, None, f"must be given with {count} {'nodes' if name == 'across' else 'ranks per node'}"
                )
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    lsh, dispatch, overlap = values["lsh"], values["dispatch"], values["overlap"]
    return Cluster(
        name=top["name"],
        nodes=nodes or top["nodes"],
        ranks_per_node=top["ranks_per_node"],
        memory=top["memory_gib"] * 2.0**30,
        dense=_scaled(compute["dense_tflops"], 1e12),
        grouped=_scaled(compute["grouped_tflops"], 1e12),
        inside=links["inside"],
        across=links["across"],
        parameters_per_second=(compute["optimizer_gparams_per_s"] or math.inf) * 1e9,
        step_seconds=compute["step_ms"] * 1e-3,
        ranks_per_processor=compute["ranks_per_processor"],
        oversubscription=across["oversubscription"],
        nodes_per_switch=across["nodes_per_switch"],
        lsh_row_seconds=lsh["row_ns"] * 1e-9,
        lsh_flops=(lsh["tflops"] or math.inf) * 1e12,
        deduplicated_row_seconds=dispatch["deduplicated_row_ns"] * 1e-9,
        node_row_seconds=dispatch["node_row_ns"] * 1e-9,
        casting=(dispatch["casting_gb_per_s"] or dispatch["coding_gb_per_s"] or math.inf) * 1e9,
        coding=(dispatch["coding_gb_per_s"] or math.inf) * 1e9,
        hidden_reduction=overlap["hidden_reduction"],
        slowdown=overlap["slowdown"],
        imbalance=values["routing"]["max_over_mean"],
        source=top["source"],
        networked="across" in document,
    )  # fmt: skip


def _merged(path: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    """The document, over what it includes."""
    document = read_document(str(path), "--cluster")
    name = shown(str(path), 1000)
    if not isinstance(document, dict):
        raise ConfigError(
            f"--cluster ({name}) must hold a mapping from keys to values, not {shown(document)}: correct it"
        )
    included = document.pop("include", None)
    if included is None:
        return document
    if not isinstance(included, str) or not included.strip() or "\0" in included:
        raise ConfigError(f"--cluster ({name}): include ({shown(included)}) must be the name of a file: change it")
    other = path.parent / included
    if len(before) >= _MOST_INCLUDED or other.resolve() in (*before, path.resolve()):
        raise ConfigError(
            f"--cluster ({name}): include ({shown(included)}) must not include files without end: drop it"
        )
    found = _merged(other, (*before, path.resolve()))
    for key, value in document.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **value} if both else value
    return found


@dataclass
class _Reader:
    """Reads sections, and collects everything that is wrong with them."""

    path: str
    problems: list[str] = field(default_factory=list)

    def problem(self, key: str, value: Any, rule: str, fix: str = "correct it") -> None:
        text = "absent" if value is None else shown(value) or repr("")
        self.problems.append(f"--cluster ({shown(self.path, 1000)}): {key} ({text}) {rule}: {fix}")

    def wrong(self, key: str, value: Any, rule: str) -> Any:
        """As `problem`, in place of a value."""
        self.problem(key, value, rule)
        return None

    def unknown(self, section: str, found: Mapping[Any, Any], known: Sequence[str]) -> None:
        for key in found:
            if key not in known:
                name = f"{section}.{shown(key)}" if section else shown(key)
                self.problem(name, found[key], f"must be one of {', '.join(known)}", "rename it")

    def section(self, name: str, found: Any, keys: Mapping[str, Key], sections: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a section, defaults filled in."""
        if found is None:
            found = {}
        if not isinstance(found, Mapping):
            self.problem(name, found, f"must be a mapping of {', '.join(keys)}")
            found = {}
        elif name:
            self.unknown(name, found, list(keys))
        values: dict[str, Any] = {}
        for key, rule in keys.items():
            label, value = f"{name}.{key}" if name else key, found.get(key)
            if value is None:
                values[key] = rule.default
                if rule.required or key in found:
                    self.problem(label, None, "must be given", "give it")
                continue
            values[key] = self._curve(label, value, rule) if rule.curve else self._value(label, value, rule)
        return values

    def _value(self, label: str, value: Any, rule: Key) -> Any:
        try:
            found = rule.convert(value)
        except ValueError as error:
            return self.wrong(label, value, str(error))
        if rule.choices and found not in rule.choices:
            return self.wrong(label, value, f"must be one of {', '.join(rule.choices)}")
        if rule.convert is not to_str and not rule.bounds.contain(found):
            return self.wrong(label, value, f"must be {rule.bounds}")
        return found

    def _curve(self, label: str, value: Any, rule: Key) -> Points | None:
        """One number, or [[size, number], ...] with rising sizes."""
        if not isinstance(value, list):
            found = self._value(label, value, rule)
            return None if found is None else ((1.0, found),)
        before, points = len(self.problems), []
        if not 0 < len(value) <= _MOST_POINTS:
            return self.wrong(label, value, f"must have between 1 and {_MOST_POINTS} points")
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2:
                return self.wrong(label, pair, "must be pairs [size, number]")
            size, number = self._value(label, pair[0], Key(to_float, _POSITIVE)), self._value(label, pair[1], rule)
            points.append((size, number))
        if len(self.problems) > before:
            return None
        if any(low[0] >= high[0] for low, high in pairwise(points)):
            return self.wrong(label, value, "must have rising sizes")
        return tuple(points)

    def link(self, name: str, values: Mapping[str, Any], *, given: bool) -> Link:
        """Of a curve, or of bandwidth and latency."""
        gbit, latency, curve = (values[key] for key in ("gbit_per_s", "latency_us", "alltoall_us"))
        ranks = values["ranks"] or 2
        kinds: tuple[Kind, ...] = ("hop", "reduction", "send")
        speeds = {kind: values.get(f"{kind}_efficiency") or 1.0 for kind in kinds}
        usual = Link(((0.0, 0.0), (1.0, 1e-12)), ranks, speeds)
        if not given:
            return usual
        if curve is not None:
            if gbit is not None or latency is not None:
                self.problem(
                    f"{name}.alltoall_us", "a curve", "must not be given with gbit_per_s or latency_us", "drop one"
                )
            if len(curve) < 2 or any(low[1] >= high[1] for low, high in pairwise(curve)):
                self.problem(f"{name}.alltoall_us", [list(pair) for pair in curve],
                             "must be at least two pairs [bytes, microseconds], both rising")  # fmt: skip
                return usual
            return Link.of_curve(curve, ranks, speeds)
        if gbit is None:
            if not any(problem.find(f" {name}.") >= 0 for problem in self.problems):
                self.problem(f"{name}.gbit_per_s", None, "must be given, or alltoall_us", "give one")
            return usual
        start, speed = (latency or 0.0) * 1e-6, gbit * 1e9 / 8 * (values.get("nics_per_node") or 1)
        return Link(((0.0, start), (speed, start + 1.0)), ranks, speeds)


def _scaled(points: Points, factor: float) -> Rate:
    return Rate(tuple((x, y * factor) for x, y in points))
