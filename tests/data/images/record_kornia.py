"""Writes kornia.npz: what kornia makes of a small picture by the operations of RandAugment.

    pip install --no-deps --target kornia kornia==0.9.0 kornia_rs
    PYTHONPATH=kornia python -m tests.data.images.record_kornia

Not part of the tests: kornia is needed for this alone. Its matrices count pixels from 0, Pillow's their centres from 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("kornia.npz")
STRENGTHS = (0.3, 0.8, -0.6)


def picture() -> np.ndarray:
    """uint8 [18, 20, 3]: slopes, waves and noise, which no operation leaves as they are."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:18, 0:20]
    waves = np.stack([40 + 150 * np.sin(x / 5) ** 2, 20 + 9 * y + 2 * x, 230 - 7 * x + 30 * np.cos(y / 3)], -1)
    return (waves + rng.normal(0, 6, (18, 20, 3))).clip(0, 255).round().astype(np.uint8)


def answers(image_1CHW: Tensor, m: float) -> dict[str, Tensor]:
    """Of strength m, in [0, 1]; and ``NAME inside``: 1 where a moved picture's pixel comes from inside of it."""
    import kornia.enhance as enhance
    import kornia.geometry as geometry

    height, width = image_1CHW.shape[-2:]

    def affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Tensor], Any]:
        from_0 = [[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2], [0, 0, 1]]
        to_source = torch.linalg.inv(torch.tensor(from_0, dtype=torch.float64)).float()[None, :2]
        return lambda image: geometry.warp_affine(image, to_source, (height, width), align_corners=True)

    moves = {
        "rotate": lambda image: geometry.rotate(image, torch.tensor([30.0 * m]), align_corners=True),
        "shear_x": affine(1, 0.3 * m, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, 0.3 * m, 1, 0),
        "translate_x": affine(1, 0, 0.45 * m * width, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, 0.45 * m * height),
    }
    found = {
        "autocontrast": enhance.normalize_min_max(image_1CHW),
        "invert": enhance.invert(image_1CHW),
        "equalize": enhance.equalize(image_1CHW),
        "posterize": enhance.posterize(image_1CHW, torch.tensor([max(4 - int(abs(m) * 4), 1)])),
        # kornia inverts what is above a threshold, Pillow from it on.
        "solarize": enhance.solarize(image_1CHW, (256 - int(abs(m) * 256) - 0.5) / 255),
        "brightness": enhance.adjust_brightness_accumulative(image_1CHW, 1 + 0.9 * m),
        "contrast": enhance.adjust_contrast_with_mean_subtraction(image_1CHW, 1 + 0.9 * m),
        "color": enhance.adjust_saturation_with_gray_subtraction(image_1CHW, 1 + 0.9 * m),
        "sharpness": enhance.sharpness(image_1CHW, 1 + 0.9 * m),
    }
    for name, move in moves.items():
        found[name], found[f"{name} inside"] = move(image_1CHW), move(torch.ones_like(image_1CHW)) > 0.999
    return found


def main() -> None:
    image = torch.from_numpy(picture()).permute(2, 0, 1).unsqueeze(0).float() / 255
    arrays = {
        f"{name} {m}": (answer[0].permute(1, 2, 0).float().clamp(0, 1) * 255).round().byte().numpy()
        for m in STRENGTHS
        for name, answer in answers(image, m).items()
    }
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
