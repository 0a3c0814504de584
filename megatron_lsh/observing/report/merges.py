"""What LSH merged in a text, in words: largest clusters, what was sent for them, worst rows, experts by kind of token.

`describe` makes the description of a layer from what `moe/merges.py` recorded; merges_page.py draws it. A file of
descriptions (`save`, `load`) lies beside a run's metrics, where the report finds it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from megatron_lsh.errors import DataError
from megatron_lsh.moe.merges import Merges

FILE = "merges.json"
LARGEST, WORST, SHOWN_TOKENS, TEXT = 8, 10, 12, 320
KINDS = ("word", "inside of a word", "number", "sign", "space", "line end", "other")
NO_CLUSTER = -1


@dataclass(frozen=True)
class Excerpt:
    """A token where it stands."""

    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Cluster:
    """Rows that one row stood for. `tokens`: the most frequent ones, with how often. `error`: of its restored outputs."""

    expert: int
    size: int
    sent: Excerpt
    tokens: list[tuple[str, int]]
    error: float
    missed: float


@dataclass(frozen=True)
class WorstRow:
    """A row whose restored output is far from the exact one. `error` is |y - y'|² / |y'|²."""

    expert: int
    row: Excerpt
    sent: Excerpt
    size: int
    error: float


@dataclass(frozen=True)
class Piece:
    """A token of the text. `cluster`: place among the largest, or NO_CLUSTER. `sent`: some row of it was."""

    text: str
    cluster: int
    sent: bool
    error: float


@dataclass(frozen=True)
class LayerMerges:
    """One layer. Shares of energies: `missed` |x - c|² / |x|², `error` |y - y'|² / |y'|², over all rows.

    Attributes:
        tokens, rows, sent, alone: numbers; a row is alone that was sent for itself only.
        sends_rows: whether rows were sent, not means (then `sent` of a cluster is the row nearest to its mean).
        largest, worst: in falling order.
        kinds: of each kind of token, its number of rows and the share of each expert in them.
        text: the first tokens of the text.
    """

    layer: int
    tokens: int
    rows: int
    sent: int
    alone: int
    missed: float
    error: float
    sends_rows: bool
    largest: list[Cluster]
    worst: list[WorstRow]
    kinds: list[tuple[str, int, list[float]]]
    text: list[Piece]


def kind_of(piece: str, before: str) -> str:
    """One of KINDS; `before` is the text of the token before."""
    text = piece.strip()
    if not text:
        return "other" if not piece else "line end" if "\n" in piece or "\r" in piece else "space"
    if any(c.isalpha() or c == "_" for c in text):
        starts = not (piece[0].isalnum() or piece[0] == "_") or not (before[-1:].isalnum() or before[-1:] == "_")
        return "word" if starts else "inside of a word"
    if any(c.isdigit() for c in text):
        return "number"
    return "other" if "\ufffd" in text else "sign"


def describe(merges: Merges, texts: Sequence[Sequence[str]]) -> LayerMerges:
    """In words. `texts`: of each of the B sequences, the text of its S tokens."""
    reader = _Reader(merges, texts)
    rows, sent = merges.token_N.shape[0], merges.sent_C.shape[0]
    sizes_C = torch.bincount(merges.cluster_N, minlength=sent)
    largest = sizes_C.argsort(descending=True, stable=True)[:LARGEST]
    largest = largest[sizes_C[largest] > 1]
    error_N = _share(merges.error_N, merges.output_N)
    return LayerMerges(
        merges.layer,
        sum(map(len, texts)),
        rows,
        sent,
        int((sizes_C == 1).sum()),
        _of_all(merges.missed_N, merges.energy_N),
        _of_all(merges.error_N, merges.output_N),
        merges.sends_rows,
        [reader.cluster(number) for number in largest.tolist()],
        [
            reader.worst(row, int(sizes_C[merges.cluster_N[row]]), float(error_N[row]))
            for row in _worst(merges, error_N)
        ],
        reader.kinds(),
        reader.text(largest.tolist(), error_N),
    )


def _worst(merges: Merges, error_N: Tensor) -> list[int]:
    """The rows with the largest errors, one of a cluster: the others of it are told by it."""
    found: dict[int, int] = {}
    for row in error_N.argsort(descending=True, stable=True).tolist():
        if len(found) == WORST or error_N[row] <= 0:
            break
        found.setdefault(int(merges.cluster_N[row]), row)
    return list(found.values())


class _Reader:
    """Rows of one layer as places in the text."""

    def __init__(self, merges: Merges, texts: Sequence[Sequence[str]]) -> None:
        self._merges, self._texts = merges, texts
        self._place_N = [(token % len(texts), token // len(texts)) for token in merges.token_N.tolist()]

    def piece(self, row: int) -> str:
        sequence, position = self._place_N[row]
        return self._texts[sequence][position]

    def excerpt(self, row: int) -> Excerpt:
        sequence, position = self._place_N[row]
        text = self._texts[sequence]
        before = "".join(text[max(position - 12, 0) : position])
        return Excerpt(before[-26:], text[position], "".join(text[position + 1 : position + 9])[:18])

    def cluster(self, number: int) -> Cluster:
        merges = self._merges
        rows_M = (merges.cluster_N == number).nonzero().squeeze(1)
        counted = Counter(self.piece(row) for row in rows_M.tolist())
        return Cluster(
            int(merges.expert_N[rows_M[0]]),
            len(rows_M),
            self.excerpt(int(merges.sent_C[number])),
            counted.most_common(SHOWN_TOKENS),
            _of_all(merges.error_N[rows_M], merges.output_N[rows_M]),
            _of_all(merges.missed_N[rows_M], merges.energy_N[rows_M]),
        )

    def worst(self, row: int, size: int, error: float) -> WorstRow:
        sent = int(self._merges.sent_C[self._merges.cluster_N[row]])
        return WorstRow(int(self._merges.expert_N[row]), self.excerpt(row), self.excerpt(sent), size, error)

    def kinds(self) -> list[tuple[str, int, list[float]]]:
        found = {kind: [0] * self._merges.num_experts for kind in KINDS}
        for row, expert in enumerate(self._merges.expert_N.tolist()):
            sequence, position = self._place_N[row]
            before = self._texts[sequence][position - 1] if position else ""
            found[kind_of(self.piece(row), before)][expert] += 1
        return [
            (kind, sum(counts), [count / sum(counts) for count in counts])
            for kind, counts in found.items()
            if any(counts)
        ]

    def text(self, largest: list[int], error_N: Tensor) -> list[Piece]:
        """The first tokens of the first sequence, each by that of its rows which is in the largest cluster."""
        merges, shown = self._merges, self._texts[0][:TEXT]
        rank = {number: place for place, number in enumerate(largest)}
        sent = set(merges.sent_C.tolist())
        rows_of: dict[int, list[int]] = {}
        for row, (sequence, position) in enumerate(self._place_N):
            if sequence == 0 and position < len(shown):
                rows_of.setdefault(position, []).append(row)
        pieces = []
        for position, text in enumerate(shown):
            rows = rows_of.get(position, [])
            clusters = [rank[number] for row in rows if (number := int(merges.cluster_N[row])) in rank]
            error = max((float(error_N[row]) for row in rows), default=0.0)
            pieces.append(Piece(text, min(clusters, default=NO_CLUSTER), any(row in sent for row in rows), error))
        return pieces


def _share(part_N: Tensor, whole_N: Tensor) -> Tensor:
    return torch.where(whole_N > 0, part_N / whole_N.clamp(min=1e-300), 0.0)


def _of_all(part_N: Tensor, whole_N: Tensor) -> float:
    return float(_share(part_N.sum(), whole_N.sum()))


def save(layers: Sequence[LayerMerges], path: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(layer) for layer in layers]), encoding="utf-8")


def load(path: Path) -> list[LayerMerges]:
    """Raises DataError for a file that `save` did not write."""
    try:
        found: list[LayerMerges] = _read(list[LayerMerges], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} must be what see_merges wrote: {error}; remove it, and the report goes without"
        ) from None
    return found


def _read(kind: Any, value: Any) -> Any:
    """A value of JSON as this type. Raises TypeError or ValueError."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{str(value)[:40]!r} is no object")
        names = get_type_hints(kind)
        if value.keys() != names.keys():
            raise TypeError(f"an object has {sorted(value)[:20]}, not {sorted(names)}")
        return kind(**{name: _read(part, value[name]) for name, part in names.items()})  # type: ignore[operator]
    if get_origin(kind) in (list, tuple):
        if not isinstance(value, list):
            raise TypeError(f"{str(value)[:40]!r} is no list")
        parts = get_args(kind) if get_origin(kind) is tuple else get_args(kind) * len(value)
        return get_origin(kind)(_read(part, each) for part, each in zip(parts, value, strict=True))  # type: ignore[misc]
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not kind or kind is float or (kind is int and not -1 <= value < 1 << 62):
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value
