"""A sheet of evaluated pictures with what a model takes them for: wrong ones first, in red, then right ones, in green."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_lsh.data.images.decode import pillow
from megatron_lsh.errors import DataError

COLUMNS, ROWS = 8, 5
_CELL, _TEXT, _GAP = 96, 26, 8
_RED, _GREEN = (200, 30, 30), (20, 120, 40)


class Judged(NamedTuple):
    """A picture uint8 [C, H, W], its class and the one that it was taken for."""

    image: np.ndarray
    label: str
    predicted: str


def chosen(judged: Sequence[Judged]) -> list[Judged]:
    """What fits on a sheet: wrong ones for at most half of it, then right ones, of both as many of each part of the set."""
    wrong = _spread([one for one in judged if one.label != one.predicted], COLUMNS * ROWS // 2)
    right = [one for one in judged if one.label == one.predicted]
    return [*wrong, *_spread(right, COLUMNS * ROWS - len(wrong))]


def _spread(judged: Sequence[Judged], number: int) -> list[Judged]:
    """At most `number` of them, evenly spaced: sets stand in the order of their classes."""
    number = min(number, len(judged))
    return [judged[index * len(judged) // number] for index in range(number)]


def draw_sheet(path: Path, judged: Sequence[Judged], title: str) -> None:
    """Write the sheet as PNG. Raises DataError if it cannot be written."""
    from PIL import ImageDraw

    module, shown = pillow(), chosen(judged)
    rows = -(-len(shown) // COLUMNS)
    size = (COLUMNS * (_CELL + _GAP) + _GAP, _TEXT + rows * (_CELL + _TEXT + _GAP) + _GAP)
    sheet = module.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill="black")
    for number, one in enumerate(shown):
        left = _GAP + number % COLUMNS * (_CELL + _GAP)
        top = _TEXT + number // COLUMNS * (_CELL + _TEXT + _GAP)
        values = one.image[0] if len(one.image) == 1 else one.image.transpose(1, 2, 0)
        picture = module.fromarray(np.ascontiguousarray(values)).convert("RGB")
        sheet.paste(picture.resize((_CELL, _CELL), module.Resampling.NEAREST), (left, top))
        right = one.label == one.predicted
        words = one.predicted if right else f"{one.predicted}, is {one.label}"
        draw.text((left, top + _CELL + 2), _ascii(words)[:16], fill=_GREEN if right else _RED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}): choose another --picture-sheet") from error


def _ascii(words: str) -> str:
    """What Pillow's built-in font has."""
    return words.encode("ascii", "replace").decode()
