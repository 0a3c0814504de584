"""RandAugment (Cubuk et al., arXiv:1909.13719): some random operations of a random strength on a picture.

The operations, and how a strength m between 0 and 10 becomes an argument, are those that Swin's recipe asks of timm
(``rand-m9-mstd0.5-inc1``): each of the chosen operations is done with probability 1/2, its strength is drawn from a normal
distribution, and a larger one always changes more. Each is a function of Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lsh.data.images.decode import pillow

if TYPE_CHECKING:
    from PIL import Image

Fill = tuple[int, ...]
Operation = Callable[[Any, float, Fill], Any]
"""(picture, strength between -1 and 1, colour of what comes in from outside) -> picture"""

DONE = 0.5
"""probability with which a chosen operation is done"""


def _ops(picture: Image.Image) -> Any:
    from PIL import ImageOps

    return ImageOps


def _enhanced(kind: str) -> Operation:
    def apply(picture: Image.Image, m: float, fill: Fill) -> Image.Image:
        from PIL import ImageEnhance

        changed: Image.Image = getattr(ImageEnhance, kind)(picture).enhance(1.0 + 0.9 * m)
        return changed

    return apply


def _affine(matrix: Callable[[float, tuple[int, int]], tuple[float, ...]]) -> Operation:
    def apply(picture: Image.Image, m: float, fill: Fill) -> Image.Image:
        module = pillow()
        moved: Image.Image = picture.transform(
            picture.size, module.Transform.AFFINE, matrix(m, picture.size), module.Resampling.BILINEAR, fillcolor=fill
        )
        return moved

    return apply


def _rotate(picture: Image.Image, m: float, fill: Fill) -> Image.Image:
    return picture.rotate(30.0 * m, pillow().Resampling.BILINEAR, fillcolor=fill)


def _posterize(picture: Image.Image, m: float, fill: Fill) -> Image.Image:
    posterized: Image.Image = _ops(picture).posterize(picture, max(4 - int(abs(m) * 4), 1))
    return posterized


def _solarize(picture: Image.Image, m: float, fill: Fill) -> Image.Image:
    solarized: Image.Image = _ops(picture).solarize(picture, 256 - int(abs(m) * 256))
    return solarized


def _solarize_add(picture: Image.Image, m: float, fill: Fill) -> Image.Image:
    more = min(128, int(abs(m) * 110))
    table = [min(255, value + more) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "autocontrast": lambda picture, m, fill: _ops(picture).autocontrast(picture),
        "equalize": lambda picture, m, fill: _ops(picture).equalize(picture),
        "invert": lambda picture, m, fill: _ops(picture).invert(picture),
        "rotate": _rotate,
        "posterize": _posterize,
        "solarize": _solarize,
        "solarize_add": _solarize_add,
        "color": _enhanced("Color"),
        "contrast": _enhanced("Contrast"),
        "brightness": _enhanced("Brightness"),
        "sharpness": _enhanced("Sharpness"),
        "shear_x": _affine(lambda m, size: (1, 0.3 * m, 0, 0, 1, 0)),
        "shear_y": _affine(lambda m, size: (1, 0, 0, 0.3 * m, 1, 0)),
        "translate_x": _affine(lambda m, size: (1, 0, 0.45 * m * size[0], 0, 1, 0)),
        "translate_y": _affine(lambda m, size: (1, 0, 0, 0, 1, 0.45 * m * size[1])),
    }
)


def randaugment(
    picture: Image.Image, number: int, magnitude: float, std: float, fill: Fill, rng: np.random.Generator
) -> Image.Image:
    """`number` operations, drawn with replacement, on a picture in mode RGB or L."""
    names = list(OPERATIONS)
    for _ in range(number):
        name = names[int(rng.integers(len(names)))]
        done, strength, negative = rng.random() < DONE, rng.normal(magnitude, std), rng.random() < 0.5
        if done:
            m = float(np.clip(strength, 0.0, 10.0)) / 10.0
            picture = OPERATIONS[name](picture, -m if negative else m, fill)
    return picture
