"""From flags to batches: builds the datasets of a run and reads them ahead of the training loop."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from megatron_lsh.config.data_paths import DEFAULT_SPLIT, SPLITS, data_problems, parse_data_path, parse_split
from megatron_lsh.data.blend import BlendedDataset, BlendSchedule
from megatron_lsh.data.cache import ArrayCache
from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.sampler import micro_batch_indices
from megatron_lsh.data.samples.dataset import Corpus, Dataset, SampleKind
from megatron_lsh.data.splits import split_documents
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.data.vocabulary import check_vocabulary
from megatron_lsh.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_lsh.config.data import DataConfig

logger = logging.getLogger(__name__)

MOST_SAMPLES = 1 << 62  # numbers of samples are int64

Batch = dict[str, torch.Tensor]
Barrier = Callable[[], None]


class Datasets(NamedTuple):
    """Datasets of a run; None where no samples were asked for or --split gives no documents."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


def _no_barrier() -> None:
    """For a run of one rank."""


def build_datasets(
    data: DataConfig,
    seed: int,
    num_samples: tuple[int, int, int],
    tokenizer: Tokenizer,
    kind: SampleKind,
    is_builder: bool = True,
    barrier: Barrier = _no_barrier,
) -> Datasets:
    """The three datasets of a run, of samples of one kind.

    Everything is checked on every rank, so a bad input raises the same error everywhere and no rank is left waiting.

    Args:
        num_samples: length of the train, valid and test dataset; 0 for one that is not needed.
        is_builder: whether this rank writes the index cache; true on one rank per node.
        barrier: waits for all ranks; called exactly once, between the builders' work and the others'.

    Raises:
        ConfigError: if the flags do not belong together.
        DataError: if a file is missing or damaged, does not fit the tokenizer or the kind of samples, or is too small.
    """
    if seed < 0:
        raise ConfigError(f"training.seed ({seed}) must not be negative: choose another --seed")
    if max(num_samples) >= MOST_SAMPLES:
        raise ConfigError(
            f"the number of samples ({max(num_samples)}) must be below 2^62: lower --train-iters or --eval-iters"
        )
    problems = data_problems(data)
    if problems:
        raise ConfigError("\n".join(problems))

    def build() -> Datasets:
        if data.mock_data:
            return Datasets(*(kind.mock(number, count) if count else None for number, count in enumerate(num_samples)))
        files = _FileDatasets(data, tokenizer, kind)
        datasets = Datasets(*(files.build(number, count) for number, count in enumerate(num_samples)))
        if num_samples[0] and datasets.train is None:
            raise ConfigError(
                f"no training data: data.data_path ({data.data_path}), data.train_data_path ({data.train_data_path}), "
                f"data.split ({data.split}): give --data-path PREFIX, or --mock-data for synthetic tokens"
            )
        return datasets

    datasets, failure = None, None
    if is_builder:
        try:
            datasets = build()
        except Exception as error:  # raised below: the other ranks must not wait for this one in vain
            failure = error
    barrier()
    if failure is not None:
        raise failure
    return datasets if datasets is not None else build()


class _FileDatasets:
    """Builds the datasets of the splits from files; each corpus is opened and checked once."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, kind: SampleKind) -> None:
        self.data, self.tokenizer, self.kind = data, tokenizer, kind
        self._opened: dict[str, IndexedDataset] = {}
        self._caches: dict[str, ArrayCache] = {}

    def build(self, number: int, num_samples: int) -> Dataset | None:
        """The dataset of a split (0 train, 1 valid, 2 test)."""
        words, name, shares = _paths_of(self.data, number)
        if not num_samples or not words or not shares[number]:
            return None
        prefixes, weights = parse_data_path(words, name)
        corpora = []
        for prefix in prefixes:
            source = self._open(prefix)
            corpora.append(Corpus(source, split_documents(source.num_documents, shares)[number]))
        too_small = next((text for corpus in corpora if (text := self.kind.shortage(corpus))), None)
        if too_small and number == 2 and self.data.split is None and self.data.data_path:
            logger.warning("no test set: %s (the default --split %s)", too_small, DEFAULT_SPLIT)
            return None
        if too_small:
            raise DataError(
                f"{SPLITS[number]} set: {too_small}: use more data, another --split, or a shorter --seq-length"
            )

        def build_corpus(index: int, samples: int) -> Dataset:
            # The splits share the seed: they draw from different documents.
            return self.kind.dataset(corpora[index], samples, self._cache(corpora[index].source.prefix))

        if len(corpora) == 1:
            return build_corpus(0, num_samples)
        schedule = BlendSchedule(weights if weights is not None else [corpus.num_tokens for corpus in corpora])
        return BlendedDataset(schedule, num_samples, build_corpus)

    def _open(self, prefix: str) -> IndexedDataset:
        if prefix not in self._opened:
            source = IndexedDataset(prefix)
            self.kind.check(source)
            check_vocabulary(source, self.tokenizer, self._cache(prefix))
            self._opened[prefix] = source
        return self._opened[prefix]

    def _cache(self, prefix: str) -> ArrayCache:
        folder = self.data.data_cache_path or str(Path(prefix).parent / "cache")
        return self._caches.setdefault(folder, ArrayCache(folder))


def _paths_of(data: DataConfig, number: int) -> tuple[list[str] | None, str, tuple[Fraction, Fraction, Fraction]]:
    """Words of the path setting of a split, its name, and the shares of the splits."""
    own = (data.train_data_path, data.valid_data_path, data.test_data_path)
    if not any(own):
        return data.data_path, "data_path", parse_split(data.split or DEFAULT_SPLIT)
    everything = (Fraction(number == 0), Fraction(number == 1), Fraction(number == 2))
    return own[number], f"{SPLITS[number]}_data_path", everything


def collate(dataset: Dataset, indices: np.ndarray) -> Batch:
    """Samples stacked to tensors of the same names and types, [B, ...]: see `make_sample`, `BertRecipe`, `T5Recipe`."""
    samples = [dataset[int(index)] for index in indices]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


class BatchIterator(Iterator[Batch]):
    """Micro-batches of one data-parallel rank in training order, read ahead by threads.

    Ends when the dataset does (an incomplete last micro-step is left out). An error in a thread is raised by the `next`
    that would have returned its batch. Use as a context manager, or call `close`.

    Args:
        consumed_samples: samples that all ranks together have read before.
        num_workers: threads; 0 reads in the calling thread.
        prefetch: micro-batches each thread is ahead.
        pin_memory: return page-locked tensors, from which a copy to a GPU can overlap with its work.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if num_workers < 0:
            raise ConfigError(f"data.num_workers ({num_workers}) must be 0 or more: 0 loads in the training thread")
        self._dataset, self._pin_memory = dataset, pin_memory
        self._consumed, self._micro_batch_size = consumed_samples, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._ahead = max(1, num_workers * prefetch)
        self._pending: deque[Future[Batch]] = deque()

    def __next__(self) -> Batch:
        if self._threads is None:
            indices = self._next_indices()
            if indices is None:
                raise StopIteration
            return self._read(indices)
        while len(self._pending) < self._ahead and (indices := self._next_indices()) is not None:
            self._pending.append(self._threads.submit(self._read, indices))
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def _next_indices(self) -> np.ndarray | None:
        step = self._micro_batch_size * self._dp_size
        if self._consumed + step > len(self._dataset):
            return None
        indices = micro_batch_indices(self._consumed, self._micro_batch_size, 1, self._dp_rank, self._dp_size)[0]
        self._consumed += step
        return indices

    def _read(self, indices: np.ndarray) -> Batch:
        batch = collate(self._dataset, indices)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def close(self) -> None:
        """Stop the threads; what they have read ahead is dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._consumed = len(self._dataset)

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
