"""Several corpora mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

from megatron_lsh.data.samples.dataset import Dataset, Sample
from megatron_lsh.errors import ConfigError

MAX_PERIOD = 1 << 18
EXHAUSTED = -(1 << 60)


class BlendSchedule:
    """Which corpus supplies which sample.

    At each step the corpus that is furthest behind its weight, in samples, comes next (Megatron's rule; of equals, the
    first). The counts are in exact proportion to the weights whenever the weights' common denominator Q divides the
    number of samples, and the sequence then repeats; so it is worked out for one period, and sample n is found by
    division. It depends on the weights alone, not on the length of the run.

    Weights whose common denominator exceeds ``MAX_PERIOD`` (2^18) are rounded to multiples of 1 / MAX_PERIOD.

    Args:
        weights: one per corpus, positive, of any sum. Strings and fractions are taken exactly.
    """

    def __init__(self, weights: Sequence[str | float | Fraction]) -> None:
        fractions = [Fraction(weight) for weight in weights]
        if not fractions or min(fractions) <= 0:
            raise ConfigError(
                f"weights of a blend ({', '.join(map(str, weights))}) must be positive: leave out what has none"
            )
        if len(fractions) > MAX_PERIOD // 2:
            raise ConfigError(f"a blend of {len(fractions)} corpora is too large: merge some of them")
        shares = [weight / sum(fractions) for weight in fractions]
        self.period = lcm(*(share.denominator for share in shares))
        if self.period > MAX_PERIOD:
            self.period = MAX_PERIOD
        self.per_period = _round_shares(shares, self.period)  # int64 [corpora], samples of each corpus per period
        self._corpus, self._rank = self._one_period()

    def _one_period(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Corpus of each step, and how many samples of the same corpus came before in the period."""
        corpus = np.empty(self.period, dtype=np.int32)
        behind = np.zeros(len(self.per_period), dtype=np.int64)  # samples owed to each corpus, times the period
        left = self.per_period.copy()
        for step in range(self.period):
            behind += self.per_period
            chosen = int(behind.argmax())
            behind[chosen] -= self.period
            left[chosen] -= 1
            if not left[chosen]:
                behind[chosen] = EXHAUSTED
            corpus[step] = chosen
        rank = np.empty(self.period, dtype=np.int64)
        for index, count in enumerate(self.per_period):
            rank[corpus == index] = np.arange(count)
        return corpus, rank

    def locate(self, sample: int) -> tuple[int, int]:
        """(corpus, number of the sample within it) of a sample of the blend."""
        periods, step = divmod(sample, self.period)
        corpus = int(self._corpus[step])
        return corpus, periods * int(self.per_period[corpus]) + int(self._rank[step])

    def counts(self, samples: int) -> npt.NDArray[np.int64]:
        """int64 [corpora]: how many of the first ``samples`` samples each corpus supplies."""
        periods, steps = divmod(samples, self.period)
        return periods * self.per_period + np.bincount(self._corpus[:steps], minlength=len(self.per_period))


def _round_shares(shares: list[Fraction], total: int) -> npt.NDArray[np.int64]:
    """Positive integers in proportion to ``shares`` that add up to ``total`` (largest remainders, at least 1 each)."""
    counts = [max(int(share * total), 1) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * total, i))
    for index in by_remainder[: max(total - sum(counts), 0)]:
        counts[index] += 1
    while sum(counts) > total:  # the minimum of 1 has added too much: take it from the largest
        counts[counts.index(max(counts))] -= 1
    return np.array(counts, dtype=np.int64)


class BlendedDataset:
    """Samples of several datasets, mixed by a schedule.

    Args:
        schedule: how they are mixed.
        num_samples: length of the blend.
        build: makes the dataset of a corpus, given its number and how many samples the blend takes from it.
    """

    def __init__(self, schedule: BlendSchedule, num_samples: int, build: Callable[[int, int], Dataset]) -> None:
        self.schedule, self.num_samples = schedule, num_samples
        self.datasets = [build(corpus, int(count)) for corpus, count in enumerate(schedule.counts(num_samples))]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        corpus, number = self.schedule.locate(index)
        return self.datasets[corpus][number]

    def fingerprint(self) -> str:
        facts = [self.schedule.per_period.tolist(), *(dataset.fingerprint() for dataset in self.datasets)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()
