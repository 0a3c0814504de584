"""Mixup and cutmix in pairs: the partner of training sample 2 j is 2 j + 1.

Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899. How a pair is mixed is a pure function of (seed, j), so it
depends on no rank and no batch; j counts through all epochs. Both of a pair are mixed alike, each into the other.

Legend: B pictures, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_lsh.config.images import ImageSettings

_STREAM = 1
"""apart from the random numbers of single samples"""


class Mixture(NamedTuple):
    """How a pair is mixed: the share of a picture that stays its own, and the rectangle (top, bottom, left, right) that is
    the partner's; an empty one for mixup."""

    share: float
    box: tuple[int, int, int, int]


NONE = Mixture(1.0, (0, 0, 0, 0))


def mixture(cfg: ImageSettings, size: tuple[int, int], seed: int, pair: int) -> Mixture:
    """Of the pair 2 `pair` and 2 `pair` + 1; `size`: height and width."""
    if not cfg.mixes:
        return NONE
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _STREAM, pair])))
    mixed, cut = rng.random() < cfg.mix_prob, rng.random() < cfg.mix_switch_prob
    if not mixed:
        return NONE
    if cfg.mixup > 0 and (not cut or cfg.cutmix == 0):
        return Mixture(float(rng.beta(cfg.mixup, cfg.mixup)), NONE.box)
    height, width = size
    side = math.sqrt(1.0 - float(rng.beta(cfg.cutmix, cfg.cutmix)))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    return Mixture(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mixed_images(images_BCHW: Tensor, share_B: Tensor, box_B4: Tensor) -> Tensor:
    """fp32 in [0, 1] of uint8 pictures, each mixed with its neighbour 2 j or 2 j + 1.

    Args:
        share_B, box_B4: see ``Mixture``; the same for both of a pair.
    """
    images = images_BCHW.float() / 255.0
    partners = _partners(images)
    top, bottom, left, right = (edge[:, None] for edge in box_B4.unbind(1))
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    inside_BHW = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    is_cut_B = ((bottom - top) * (right - left) > 0).squeeze(1)
    weight_B = torch.where(is_cut_B, torch.ones_like(share_B), share_B)[:, None, None, None]
    return torch.where(inside_BHW[:, None], partners, torch.lerp(partners, images, weight_B))


def targets(labels_B: Tensor, share_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """fp32 [B, K]: the share of each class, of mixed pictures those of both; some of it spread over all classes."""
    hot_BK = torch.nn.functional.one_hot(labels_B, classes).float() * (1.0 - smoothing) + smoothing / classes
    if len(labels_B) % 2:
        return hot_BK
    return torch.lerp(_partners(hot_BK), hot_BK, share_B[:, None])


def _partners(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
