from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lsh.config.data import DataConfig
from megatron_lsh.data.blend import BlendedDataset
from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.loader import Batch, BatchIterator, Datasets
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.tokenizers import ByteTokenizer, NullTokenizer
from megatron_lsh.data.vocabulary import description_path, read_description, write_description
from megatron_lsh.errors import ConfigError, DataError
from tests.data.helpers import gpt_datasets, numbered, write_dataset

TOKENIZER = NullTokenizer(10_000)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """1,000 tokens in 100 documents; each token is its own position."""
    write_dataset(tmp_path / "corpus", numbered([10] * 100))
    return str(tmp_path / "corpus")


def build(num_samples: tuple[int, int, int] = (30, 4, 2), seq_length: int = 8, **settings: object) -> Datasets:
    data = DataConfig(**settings)  # type: ignore[arg-type]
    return gpt_datasets(data, seq_length, 1234, num_samples, TOKENIZER)


def test_splits_by_document(corpus: str) -> None:
    datasets = build((300, 60, 60), data_path=[corpus], split="80,15,5")
    seen = []
    for dataset, (low, high) in zip(datasets, [(0, 800), (800, 950), (950, 1000)], strict=True):
        assert dataset is not None
        tokens = np.concatenate([dataset[i]["tokens"] for i in range(len(dataset))])
        assert tokens.min() >= low and tokens.max() < high
        seen.append(dataset.fingerprint())
    assert [len(dataset) for dataset in datasets if dataset] == [300, 60, 60]
    assert len(set(seen)) == 3
    assert (Path(corpus).parent / "cache").is_dir()


def test_no_dataset_where_none_is_wanted(corpus: str) -> None:
    assert build((10, 0, 5), data_path=[corpus], split="9,1")[1:] == (None, None)
    # The default split leaves 0 of 100 documents to the test set: nobody asked for one, so it is only mentioned.
    assert build((10, 1, 1), data_path=[corpus])[2] is None


def test_default_test_split_is_mentioned(corpus: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(data_path=[corpus])
    assert "no test set" in caplog.text


def test_paths_per_split(corpus: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", [[t + 2000 for t in document] for document in numbered([10] * 10)])
    train, valid, test = build(train_data_path=[corpus], valid_data_path=[str(tmp_path / "other")])
    assert train is not None and valid is not None and test is None
    assert max(int(train[i]["tokens"].max()) for i in range(30)) < 1000
    assert min(int(valid[i]["tokens"].min()) for i in range(4)) >= 2000


def test_blend(corpus: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    write_dataset(tmp_path / "other", [[t + 2000 for t in document] for document in numbered([10] * 50)])
    train = build(data_path=["0.25", corpus, "0.75", other], split="1", num_samples=(40, 0, 0)).train
    assert isinstance(train, BlendedDataset)
    assert sum(int(train[i]["tokens"][0]) < 1000 for i in range(40)) == 10
    # Without weights, in proportion to the tokens: 1000 to 500.
    train = build(data_path=[corpus, other], split="1", num_samples=(30, 0, 0)).train
    assert train is not None
    assert sum(int(train[i]["tokens"][0]) < 1000 for i in range(30)) == 20


def test_cache_path(corpus: str, tmp_path: Path) -> None:
    build(data_path=[corpus], data_cache_path=str(tmp_path / "mine"), split="9,1,0")
    assert len(list((tmp_path / "mine").iterdir())) == 3  # train, valid, and the range of ids
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, "no training data"),
        ({"data_path": ["@"], "split": "0,1"}, ConfigError, "no training data"),
        ({"data_path": ["@"], "mock_data": True}, ConfigError, "data_path .* must not be given with data.mock_data"),
        (
            {"valid_data_path": ["@"], "mock_data": True},
            ConfigError,
            "data_path .* must not be given with data.mock_data",
        ),
        ({"data_path": ["@"], "train_data_path": ["@"]}, ConfigError, "must not be given with data.data_path"),
        ({"split": "1,1,1", "train_data_path": ["@"]}, ConfigError, "must not be given with .*: drop --split"),
        ({"data_path": ["@"], "split": "1,x"}, ConfigError, r"data.split \(1,x\) must be up to three shares"),
        ({"data_path": ["@"], "split": "1,1,1,1"}, ConfigError, "must be up to three shares"),
        ({"data_path": ["@"], "split": "1,-1"}, ConfigError, "must be up to three shares"),
        ({"data_path": ["@"], "split": "0"}, ConfigError, "must be up to three shares"),
        ({"data_path": ["@"], "split": "1e-999999999,0"}, ConfigError, "must be up to three shares"),
        ({"data_path": ["@"], "split": "1e999999999,0"}, ConfigError, "must be up to three shares"),
        ({"data_path": ["0.5", "@", "0.5"]}, ConfigError, "one weight before each prefix"),
        ({"data_path": ["@", "0.5"]}, ConfigError, "one weight before each prefix"),
        ({"data_path": ["0", "@", "1", "@2"]}, ConfigError, r"data.data_path .0 .* must have positive weights"),
        ({"data_path": ["nan", "@", "1", "@2"]}, ConfigError, "must have positive weights"),
        ({"data_path": ["1e-999999999", "@", "1", "@2"]}, ConfigError, "must have positive weights"),
        (
            {"data_path": ["1", "@", "1", "@"]},
            ConfigError,
            "corpus once: give it the sum of its weights in --data-path",
        ),
        ({"data_path": ["@gone"]}, DataError, "corpusgone.idx does not exist"),
        (
            {"data_path": ["@"], "split": "1000,1,0"},
            DataError,
            "valid set: .* supplies 0 of its 100 documents with 0 tokens",
        ),
        (
            {"data_path": ["@"], "split": "98,1,1"},
            DataError,
            "valid set: .* supplies 1 of its 100 documents with 10 tokens",
        ),
    ],
)
def test_errors(corpus: str, settings: dict[str, object], error: type[Exception], message: str) -> None:
    settings = {
        key: [word.replace("@", corpus) for word in value] if isinstance(value, list) else value
        for key, value in settings.items()
    }
    with pytest.raises(error, match=message):
        build(seq_length=16, **settings)


def test_negative_seed(corpus: str) -> None:
    with pytest.raises(ConfigError, match="seed"):
        gpt_datasets(DataConfig(data_path=[corpus]), 8, -1, (1, 0, 0), TOKENIZER)


def test_vocabulary_by_highest_id(corpus: str) -> None:
    for is_builder in (True, False):
        with pytest.raises(DataError, match=r"corpus\.bin holds token id 999, but ByteTokenizer has the ids 0 to 256"):
            gpt_datasets(DataConfig(data_path=[corpus]), 8, 1, (1, 0, 0), ByteTokenizer(), is_builder)


def test_vocabulary_by_description(corpus: str, tmp_path: Path) -> None:
    """A tokenizer whose ids all fit is still the wrong one."""
    dataset = IndexedDataset(corpus)
    write_description(dataset, NullTokenizer(1000), None)
    facts = read_description(dataset)
    assert facts is not None and (facts["vocab_size"], facts["documents"], facts["tokens"]) == (1001, 100, 1000)
    with pytest.raises(
        DataError, match=r"written with NullTokenizer .*vocabulary 1001.*NullTokenizer .vocabulary 10001"
    ):
        build(data_path=[corpus])
    gpt_datasets(DataConfig(data_path=[corpus]), 8, 1, (1, 0, 0), NullTokenizer(1000))
    # A description of other data says nothing.
    write_dataset(tmp_path / "second", numbered([20] * 50))
    shutil.copy(description_path(corpus), tmp_path / "second.json")
    build(data_path=[str(tmp_path / "second")], split="1")


def test_builder_failure_reaches_the_barrier(corpus: str) -> None:
    """The other ranks wait there, and find the same error by themselves."""
    for is_builder in (True, False):
        calls: list[str] = []
        data = DataConfig(data_path=[f"{corpus}gone"])
        with pytest.raises(DataError, match="does not exist"):
            gpt_datasets(data, 8, 1, (1, 0, 0), TOKENIZER, is_builder, lambda: calls.append("barrier"))  # noqa: B023
        assert calls == ["barrier"]


def test_only_the_builder_writes(corpus: str) -> None:
    cache = Path(corpus).parent / "cache"
    at_barrier: list[set[str]] = []

    def barrier() -> None:
        at_barrier.append({path.name for path in cache.iterdir()} if cache.is_dir() else set())

    data = DataConfig(data_path=[corpus], split="1")
    gpt_datasets(data, 8, 1, (30, 0, 0), TOKENIZER, True, barrier)
    gpt_datasets(data, 8, 1, (30, 0, 0), TOKENIZER, False, barrier)
    assert len(at_barrier[0]) == 2 and at_barrier[1] == at_barrier[0] == {path.name for path in cache.iterdir()}


def batches(datasets: Datasets, workers: int, consumed: int = 0, rank: int = 0, size: int = 1) -> list[Batch]:
    assert datasets.train is not None
    with BatchIterator(
        datasets.train, consumed_samples=consumed, micro_batch_size=3, dp_rank=rank, dp_size=size, num_workers=workers
    ) as iterator:
        return list(iterator)


def test_batches(corpus: str) -> None:
    datasets = build(data_path=[corpus], reset_attention_mask=True)
    expected = batches(datasets, 0)
    assert len(expected) == 10
    for batch in expected:
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
            "tokens": (torch.int64, (3, 8)),
            "labels": (torch.int64, (3, 8)),
            "loss_mask": (torch.float32, (3, 8)),
            "position_ids": (torch.int64, (3, 8)),
            "document_ids": (torch.int64, (3, 8)),
        }
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    for workers in (1, 3):
        threaded = batches(datasets, workers)
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(expected, threaded, strict=True))
    resumed = batches(datasets, 2, consumed=12)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(expected[4:], resumed, strict=True))
    ranks = [batches(datasets, 2, rank=rank, size=2) for rank in range(2)]
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(expected, together, strict=True))


class Failing:
    """Fails at sample 7; counts its calls."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Sample:
        self.threads.add(threading.current_thread().name)
        if index == 7:
            raise DataError("sample 7 is bad")
        return {"tokens": np.full(2, index)}

    def fingerprint(self) -> str:
        return "x"


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_training_thread(workers: int) -> None:
    dataset = Failing()
    iterator = BatchIterator(dataset, consumed_samples=0, micro_batch_size=2, dp_rank=0, dp_size=1, num_workers=workers)
    assert [next(iterator)["tokens"][0, 0].item() for _ in range(3)] == [0, 2, 4]
    with pytest.raises(DataError, match="sample 7 is bad"):
        next(iterator)
    iterator.close()
    assert list(iterator) == []
    assert (threading.current_thread().name in dataset.threads) == (workers == 0)


def test_negative_workers() -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        BatchIterator(Failing(), consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1, num_workers=-1)


def test_mock_data_is_reproducible_and_learnable() -> None:
    first, second = (build(mock_data=True, num_samples=(50, 5, 0), seq_length=256) for _ in range(2))
    assert first.train is not None and second.train is not None and first.valid is not None and first.test is None
    assert all((first.train[i]["tokens"] == second.train[i]["tokens"]).all() for i in range(50))
    assert first.train.fingerprint() == second.train.fingerprint() != first.valid.fingerprint()
    assert (first.train[0]["tokens"] != first.valid[0]["tokens"]).any()
    # What follows a token is nearly always the same: the most frequent successor is right about 0.9^2 of the time.
    successors: dict[int, list[int]] = {}
    small = gpt_datasets(DataConfig(mock_data=True), 256, 1, (50, 0, 0), NullTokenizer(50)).train
    assert small is not None
    for i in range(50):
        for token, label in zip(small[i]["tokens"].tolist(), small[i]["labels"].tolist(), strict=True):
            successors.setdefault(token, []).append(label)
    right = sum(labels.count(max(set(labels), key=labels.count)) for labels in successors.values())
    assert 0.75 < right / (50 * 256) < 0.9
