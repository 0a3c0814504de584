"""Pictures made from a seed: gratings whose direction is their class, so that a small model can learn them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_lsh.data.images.idx import write_idx


def gratings(count: int, classes: int = 4, side: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, side, side] and labels uint8 [count]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    y, x = np.mgrid[:side, :side]
    angle = np.pi * labels / classes
    phase = rng.uniform(0, 2 * np.pi, count)
    across = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    waves = 127 + 100 * np.sin(across * 1.2 + phase[:, None, None]) + rng.normal(0, 10, (count, side, side))
    return waves.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def write_gratings(folder: Path, train: int = 64, valid: int = 10, **kind: int) -> Path:
    """A folder of IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", train, 1), ("valid", valid, 2)):
        images, labels = gratings(count, seed=seed, **kind)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder
