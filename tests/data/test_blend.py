from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.blend import MAX_PERIOD, BlendedDataset, BlendSchedule
from megatron_lsh.data.samples.mock import MockDataset
from megatron_lsh.errors import ConfigError
from tests.data.samples.test_gpt import RULES

weights_ = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(weights_)
def test_takes_the_corpus_furthest_behind(weights: list[int]) -> None:
    """Against the definition, in exact arithmetic, over two and a half periods."""
    schedule, total = BlendSchedule(weights), sum(weights)
    taken = [0] * len(weights)
    for sample in range(5 * total // 2):
        behind = [Fraction(weight * (sample + 1), total) - count for weight, count in zip(weights, taken, strict=True)]
        corpus, number = schedule.locate(sample)
        assert behind[corpus] == max(behind)
        assert number == taken[corpus]  # each corpus is read in order, without gaps
        taken[corpus] += 1
        # So no corpus is ever a whole sample ahead, nor far behind.
        assert all(-1 < Fraction(w * (sample + 1), total) - c < 2 for w, c in zip(weights, taken, strict=True))
        assert schedule.counts(sample + 1).tolist() == taken


@settings(deadline=None, max_examples=4)
@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=40), st.integers(1, 10**12))
def test_proportions_of_fine_weights(weights: list[int], samples: int) -> None:
    counts = BlendSchedule(weights).counts(samples)
    assert counts.sum() == samples
    exact = np.array(weights) / sum(weights)
    assert np.abs(counts / samples - exact).max() <= (len(weights) + 1) / MAX_PERIOD + len(weights) / samples


def test_weights_are_exact_whatever_their_sum() -> None:
    assert BlendSchedule(["0.3", "0.7"]).period == 10
    assert BlendSchedule(["30", "70"]).per_period.tolist() == [3, 7]
    assert BlendSchedule(["1", "1", "1"]).per_period.tolist() == [1, 1, 1]
    tiny = BlendSchedule(["1e-7", "1"])
    assert tiny.counts(MAX_PERIOD).tolist() == [1, MAX_PERIOD - 1]  # the least share there is
    assert [tiny.locate(i)[1] for i in (MAX_PERIOD, MAX_PERIOD + 1)] == [MAX_PERIOD - 1, MAX_PERIOD]


def test_refuses_weights() -> None:
    for weights in ([], ["0", "1"], ["-1", "2"]):
        with pytest.raises(ConfigError, match="must be positive"):
            BlendSchedule(weights)


def test_blended_dataset() -> None:
    asked = []

    def build(corpus: int, count: int) -> MockDataset:
        asked.append(count)
        return MockDataset(corpus, 8, count, 1, RULES)

    blend = BlendedDataset(BlendSchedule(["1", "3"]), 10, build)
    assert len(blend) == 10 and asked == [3, 7]
    for index in range(10):
        corpus, number = blend.schedule.locate(index)
        assert (blend[index]["tokens"] == blend.datasets[corpus][number]["tokens"]).all()
    with pytest.raises(IndexError):
        blend[10]
    other = BlendedDataset(BlendSchedule(["1", "1"]), 10, lambda c, n: MockDataset(c, 8, n, 1, RULES))
    assert blend.fingerprint() != other.fingerprint()
