from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.cache import ArrayCache
from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.samples.gpt import GPTDataset, SampleRules, make_sample
from megatron_lsh.errors import DataError
from tests.data.helpers import numbered, write_dataset

RULES = SampleRules(eod=0, vocab_size=65535)


def make(source: IndexedDataset, num_samples: int, seq_length: int = 4, seed: int = 1, **other: object) -> GPTDataset:
    documents = other.pop("documents", (0, source.num_documents))
    cache = ArrayCache(other.pop("cache", None))  # type: ignore[arg-type]
    return GPTDataset(source, documents, seq_length, num_samples, seed, RULES, cache)  # type: ignore[arg-type]


def epoch_of(dataset: GPTDataset, epoch: int) -> list[list[int]]:
    """All windows of an epoch, in the order of reading."""
    size = dataset.samples_per_epoch
    return [dataset.window(i).tolist() for i in range(epoch * size, (epoch + 1) * size)]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), seq_length=st.integers(1, 7), data=st.data())
def test_an_epoch_reads_every_token_once(lengths: list[int], seq_length: int, data: st.DataObject) -> None:
    """Windows overlap by one token and are, put together again, the documents in some order without gaps."""
    start = data.draw(st.integers(0, len(lengths) - 1))
    used = lengths[start:]
    documents = numbered(lengths)
    with tempfile.TemporaryDirectory() as folder:
        source = write_dataset(Path(folder) / "d", documents)
        if sum(used) < seq_length + 1:
            with pytest.raises(DataError, match="less than one sample"):
                make(source, 1, seq_length, documents=(start, len(lengths)))
            return
        per_epoch = (sum(used) - 1) // seq_length
        dataset = make(source, 2 * per_epoch, seq_length, documents=(start, len(lengths)))
        assert len(dataset) == 2 * per_epoch and dataset.samples_per_epoch == per_epoch
        for epoch in range(2):
            windows = epoch_of(dataset, epoch)
            inputs = [token for window in windows for token in window[:-1]]
            labels = [token for window in windows for token in window[1:]]
            assert len(set(inputs)) == len(inputs) == per_epoch * seq_length
            assert len(set(labels)) == len(labels)
            # Put the windows back end to end: each begins with the token the one before ended with.
            by_first = {window[0]: window for window in windows}
            (first,) = set(inputs) - set(labels)
            stream = [first]
            while stream[-1] in by_first:
                stream += by_first.pop(stream[-1])[1:]
            assert not by_first
            # The stream is whole documents of the range, the last one possibly cut.
            left = {document[0]: document for document in documents[start:] if document}
            while stream:
                document = left.pop(stream[0])
                assert stream[: len(document)] == document[: len(stream)]
                stream = stream[len(document) :]


def test_order_is_a_function_of_seed_and_number_alone(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "d", numbered([7, 3, 11, 5, 2, 9, 13, 4]))
    short, long, other = make(source, 7), make(source, 200), make(source, 200, seed=2)
    assert len(short) == 7
    assert [short.window(i).tolist() for i in range(7)] == [long.window(i).tolist() for i in range(7)]
    assert long.fingerprint() == short.fingerprint() != other.fingerprint()
    assert epoch_of(long, 0) != epoch_of(other, 0)
    assert sorted(epoch_of(long, 0)) != sorted(epoch_of(long, 1))  # documents are shuffled anew for each epoch
    for index in (-1, 7):
        with pytest.raises(IndexError):
            short.window(index)


def test_order_is_pinned(tmp_path: Path) -> None:
    """A resumed run must read the same samples under every version of numpy, so this order may never change."""
    dataset = make(write_dataset(tmp_path / "d", numbered([7, 3, 11, 5])), 12, seed=1234)
    assert [int(dataset.window(i)[0]) for i in range(12)] == PINNED


PINNED = [1, 5, 16, 7, 12, 20, 4, 19, 15, 9, 11, 0]


def test_a_document_of_several_sequences_stays_together(tmp_path: Path) -> None:
    from megatron_lsh.data.indexed import IndexedDatasetWriter

    with IndexedDatasetWriter(tmp_path / "d", "u2") as writer:
        writer.add_document([0, 1, 2, 3, 4], [2, 3])
        writer.add_document([5, 6, 7, 8], [1, 1, 2])
    windows = epoch_of(make(IndexedDataset(tmp_path / "d"), 100, 8), 0)
    assert windows in ([[*range(9)]], [[5, 6, 7, 8, 0, 1, 2, 3, 4]])


def test_cached_and_in_memory_are_the_same(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "d", numbered([7, 3, 11, 5, 2, 9, 13, 4]))
    memory, built, mapped = (make(source, 60, cache=cache) for cache in (None, tmp_path / "c", tmp_path / "c"))
    for i in range(60):
        assert memory.window(i).tolist() == built.window(i).tolist() == mapped.window(i).tolist()
    assert len(list((tmp_path / "c").iterdir())) == 1
    make(source, 60, seed=2, cache=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_foreign_token_id_is_refused(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "d", [[1, 2, 65535, 3, 4]])
    with pytest.raises(DataError, match=r"d\.bin holds token id 65535, but the vocabulary has 65535 ids"):
        make(source, 1)[0]
    source = write_dataset(tmp_path / "e", [[1, 2, -5, 3, 4]], "i4")
    with pytest.raises(DataError, match="holds token id -5"):
        make(source, 1)[0]


def test_sample_by_hand() -> None:
    window = np.array([5, 0, 6, 7, 0, 0, 8])
    plain = make_sample(window, RULES)
    assert set(plain) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert plain["tokens"].tolist() == [5, 0, 6, 7, 0, 0] and plain["labels"].tolist() == [0, 6, 7, 0, 0, 8]
    assert plain["loss_mask"].tolist() == [1] * 6 and plain["position_ids"].tolist() == [*range(6)]
    assert plain["loss_mask"].dtype == np.float32 and plain["position_ids"].dtype == np.int64
    reset = make_sample(window, SampleRules(0, 10, True, True, True))
    assert reset["loss_mask"].tolist() == [1, 0, 1, 1, 0, 0]
    assert reset["position_ids"].tolist() == [0, 1, 0, 1, 2, 0]
    assert reset["document_ids"].tolist() == [0, 0, 1, 1, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=20))
def test_sample_against_loop(window: list[int]) -> None:
    """Megatron's rules, one token at a time: an end token belongs to the document it ends."""
    sample = make_sample(np.array(window), SampleRules(0, 4, True, True, True))
    position, document = 0, 0
    for i, token in enumerate(window[:-1]):
        assert sample["position_ids"][i] == position and sample["document_ids"][i] == document
        assert sample["loss_mask"][i] == (token != 0)
        position, document = (0, document + 1) if token == 0 else (position + 1, document)
