from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lsh.config.data import DataConfig
from megatron_lsh.data.cache import ArrayCache, Layout
from megatron_lsh.data.samples import epochs
from megatron_lsh.data.samples.dataset import Corpus
from megatron_lsh.data.samples.epochs import EpochArrays
from megatron_lsh.data.samples.gpt import GPTDataset, SampleRules
from megatron_lsh.data.samples.packing import PackedPassages, Packing
from megatron_lsh.data.tokenizers import NullTokenizer
from megatron_lsh.errors import ConfigError
from tests.data.helpers import gpt_datasets, numbered, write_dataset

LAYOUT: Layout = {"a": ((2,), np.dtype("<i8")), "b": ((), np.dtype("<u2"))}


@pytest.mark.parametrize("kept", [True, False])
def test_every_epoch_is_what_was_made_for_it(tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, over the bounds of blocks, with files and without; no epoch is made twice if it is kept."""
    monkeypatch.setattr(epochs, "BLOCK_EPOCHS", 3)
    monkeypatch.setattr(epochs, "BLOCKS_AT_START", 2)
    made: list[int] = []

    def make(epoch: int) -> tuple[np.ndarray, ...]:
        made.append(epoch)
        return np.array([epoch, -epoch]), np.array(epoch % 7)

    arrays = EpochArrays(LAYOUT, 11, make, {"what": "test"}, ArrayCache(tmp_path if kept else None))
    assert made == (list(range(6)) if kept else [])
    for epoch in (0, 10, 1, 7, 5, 2, 9, 0):
        found = arrays[epoch]
        assert found["a"].tolist() == [epoch, -epoch] and found["b"] == epoch % 7
    assert not kept or sorted(made) == list(range(11))


def test_long_runs_over_a_small_corpus_make_few_epochs_in_advance(tmp_path: Path) -> None:
    """A trillion samples of 200 documents: little to write at the start, and any sample can be read."""
    source = write_dataset(tmp_path / "d", numbered([10] * 200))
    rules, cache = SampleRules(eod=0, vocab_size=5000), ArrayCache(tmp_path / "cache")
    long = GPTDataset(source, (0, 200), 4, 10**12, 1, rules, cache)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy")) < 1 << 25
    short = GPTDataset(source, (0, 200), 4, 5000, 1, rules, ArrayCache(None))
    assert long.window(4999).tolist() == short.window(4999).tolist()
    size = long.samples_per_epoch
    last = [long.window(10**12 - 10**12 % size - size + i).tolist() for i in range(size)]
    assert len({token for window in last for token in window[:-1]}) == 4 * size
    passages = PackedPassages(Corpus(source, (0, 200)), Packing(8), 10**12, 1, 5000, ArrayCache(None))
    assert len(passages[10**12 - 1].tokens) > 0


def test_more_samples_than_can_be_numbered_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"number of samples .4611686018427387904. must be below 2\^62: lower --train-"
    ):
        gpt_datasets(DataConfig(mock_data=True), 8, 1, (1 << 62, 0, 0), NullTokenizer(10))
