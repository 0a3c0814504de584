"""Samples of pictures: for training in an order and with changes that depend on (seed, number) alone, for evaluation once.

Training samples are numbered through all epochs: number i is in epoch i // n of a set of n pictures, whose order depends on
(seed, epoch). Evaluation sets hold every picture once, see ``EvaluationOrder``.
"""

from __future__ import annotations

import hashlib
import logging
from threading import Lock
from typing import Any

import numpy as np

from megatron_lsh.config.images import ImageSettings
from megatron_lsh.data.images.augment import for_evaluation, for_training
from megatron_lsh.data.images.decode import decode
from megatron_lsh.data.images.mixing import mixture
from megatron_lsh.data.images.sources import Part
from megatron_lsh.data.samples.classification import BLANK, epoch_orders
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.errors import DataError

logger = logging.getLogger(__name__)


class Reader:
    """Decodes the pictures of one part; an ``ExampleSet`` of them as evaluations see them.

    Args:
        size: height and width that the model sees.
        channels: 3, or 1.
    """

    def __init__(self, part: Part, cfg: ImageSettings, size: tuple[int, int], channels: int) -> None:
        self.part, self.cfg, self.size, self.channels = part, cfg, size, channels
        self.broken: set[int] = set()
        """numbers of pictures that could not be read, with --skip-broken-images"""
        self._lock = Lock()

    def train(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Picture `index`, changed at random: uint8 [C, H, W], and its label. A broken one may be left out for the next.

        Raises:
            DataError: it cannot be read, or no other can.
        """
        for offset in range(len(self.part)):
            place = (index + offset) % len(self.part)
            picture = self._open(place)
            if picture is not None:
                return for_training(picture, self.size, self.cfg, rng), int(self.part.labels[place])
        raise DataError(f"{self.part.pictures.what} has no picture that can be read: check --data-path")

    def __len__(self) -> int:
        return len(self.part)

    def sample(self, index: int) -> Sample:
        """Image uint8 [C, H, W] and label int64 []; blank, with the label `BLANK`, for that number and a broken picture."""
        picture = None if index == BLANK else self._open(index)
        if picture is None:
            image, label = np.zeros((self.channels, *self.size), dtype=np.uint8), BLANK
        else:
            image, label = for_evaluation(picture, self.size, self.cfg), int(self.part.labels[index])
        return {"image": image, "label": np.asarray(label, dtype=np.int64)}

    def fingerprint(self) -> str:
        return self.part.fingerprint()

    def _open(self, place: int) -> Any:
        """A picture of Pillow's; None for a broken one that is to be skipped."""
        index = int(self.part.indices[place])
        where = self.part.pictures.where(index)
        try:
            content = self.part.pictures.content(index)
            return decode(content, where, self.channels, self.cfg.max_image_pixels)
        except DataError as error:
            if not self.cfg.skip_broken_images:
                raise
            with self._lock:
                known, self.broken = place in self.broken, self.broken | {place}
            if not known:
                logger.warning("skipped a picture (%d so far): %s", len(self.broken), error)
            return None


class TrainingPictures:
    """A ``Dataset`` of samples with image uint8 [C, H, W], label int64 [], and how its pair is mixed: mix_share fp32 [],
    mix_box int64 [4], see ``Mixture``."""

    def __init__(self, reader: Reader, seed: int, num_samples: int) -> None:
        self._reader, self._seed, self._num_samples = reader, seed, num_samples
        self._order = epoch_orders(len(reader), seed)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        cfg = self._reader.cfg
        epoch, place = divmod(index, len(self._reader))
        number = int(self._order(epoch)[place])
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, 0, epoch, number])))
        image, label = self._reader.train(number, rng)
        share, box = mixture(cfg, self._reader.size, self._seed, index // 2)
        return {
            "image": image,
            "label": np.asarray(label, dtype=np.int64),
            "mix_share": np.asarray(share, dtype=np.float32),
            "mix_box": np.asarray(box, dtype=np.int64),
        }

    def fingerprint(self) -> str:
        facts = (self._reader.fingerprint(), self._seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()
