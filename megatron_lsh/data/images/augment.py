"""What training does to a picture before the model sees it: a pure function of the picture and a random generator.

In this order: random crop, mirror image, RandAugment (randaugment.py), random turn and shift, erasing. Crop: Szegedy et al.,
arXiv:1409.4842; erasing: Zhong et al., arXiv:1708.04896, with noise in the place of the rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_lsh.config.images import ImageSettings
from megatron_lsh.data.images.decode import pillow, pixels
from megatron_lsh.data.images.randaugment import randaugment

if TYPE_CHECKING:
    from PIL import Image

_CROP_ATTEMPTS = 10
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


def for_training(
    picture: Image.Image, size: tuple[int, int], cfg: ImageSettings, rng: np.random.Generator
) -> np.ndarray:
    """uint8 [C, height, width] of a picture in mode RGB or L, changed at random. `size`: height and width."""
    box = crop_box(picture.size, cfg.crop_scale, cfg.crop_ratio, rng) if cfg.crop_scale != [1.0, 1.0] else None
    picture = picture.resize((size[1], size[0]), _filter(cfg.interpolation), box=box)
    if rng.random() < cfg.hflip:
        picture = picture.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
    fill = mean_colour(cfg, len(picture.getbands()))
    if cfg.randaugment_ops:
        picture = randaugment(picture, cfg.randaugment_ops, cfg.randaugment_magnitude, cfg.randaugment_std, fill, rng)
    if cfg.random_rotation or cfg.random_shift:
        picture = _moved(picture, cfg, rng)
    image = pixels(picture)
    if rng.random() < cfg.random_erasing:
        image = erased(image, cfg, rng)
    return image


def for_evaluation(picture: Image.Image, size: tuple[int, int], cfg: ImageSettings) -> np.ndarray:
    """uint8 [C, height, width]: resized so that the centre of `eval_crop_ratio` fits, and that centre."""
    height, width = size
    scale = max(height / picture.height, width / picture.width) / cfg.eval_crop_ratio
    resized = (max(round(picture.width * scale), width), max(round(picture.height * scale), height))
    if resized != picture.size:
        picture = picture.resize(resized, _filter(cfg.interpolation))
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return pixels(picture.crop((left, top, left + width, top + height)))


def crop_box(
    size: tuple[int, int], scale: list[float], ratio: list[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of a picture of width and height `size`.

    Its share of the area is uniform in `scale` and the logarithm of width / height uniform in that of `ratio`; what never
    fits becomes the largest centre within `ratio`.
    """
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        w, h = _random_sides(width * height, scale, ratio, rng)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = max(min(width, round(height * ratio[1])), 1)
    h = max(min(height, round(width / ratio[0])), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _random_sides(
    whole: int, scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int]:
    """Of a rectangle whose share of the area `whole` is uniform in `scale`, and log(first / second) in that of `ratio`."""
    area = whole * rng.uniform(scale[0], scale[1])
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def _moved(picture: Image.Image, cfg: ImageSettings, rng: np.random.Generator) -> Image.Image:
    """Turned about its centre and shifted; what comes in from outside has the colour of the corner pixels' median."""
    degrees = rng.uniform(-cfg.random_rotation, cfg.random_rotation)
    right, down = (int(rng.integers(-cfg.random_shift, cfg.random_shift + 1)) for _ in range(2))
    corners = np.asarray(picture)[np.ix_((0, -1), (0, -1))]
    fill = tuple(int(value) for value in np.atleast_1d(np.median(corners, axis=(0, 1))))
    return picture.rotate(degrees, pillow().Resampling.BILINEAR, translate=(right, down), fillcolor=fill)


def erased(image: np.ndarray, cfg: ImageSettings, rng: np.random.Generator) -> np.ndarray:
    """A copy of uint8 [C, height, width] with normal noise (of --image-mean and --image-std) in one rectangle."""
    channels, height, width = image.shape
    for _ in range(_CROP_ATTEMPTS):
        h, w = _random_sides(height * width, _ERASED_AREA, _ERASED_RATIO, rng)
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            mean, std = (
                np.asarray(cfg.per_channel(v, channels))[:, None, None] for v in (cfg.image_mean, cfg.image_std)
            )
            noise = (mean + std * rng.standard_normal((channels, h, w))) * 255.0
            image = image.copy()
            image[:, top : top + h, left : left + w] = noise.round().clip(0, 255).astype(np.uint8)
            return image
    return image


def mean_colour(cfg: ImageSettings, channels: int) -> tuple[int, ...]:
    """--image-mean in bytes."""
    return tuple(round(255 * value) for value in cfg.per_channel(cfg.image_mean, channels))


def _filter(interpolation: str) -> Image.Resampling:
    return getattr(pillow().Resampling, interpolation.upper())  # type: ignore[no-any-return]
