"""What a dataset is, and what the loader asks of each kind of samples."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from megatron_lsh.data.cache import ArrayCache
from megatron_lsh.data.indexed import IndexedDataset, bin_path
from megatron_lsh.errors import DataError

Sample = dict[str, np.ndarray]


class Dataset(Protocol):
    """Samples by number. `fingerprint` identifies the content and its order; it is stored in checkpoints."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def fingerprint(self) -> str: ...


class Corpus(NamedTuple):
    """One indexed dataset and the range of documents that a split takes from it."""

    source: IndexedDataset
    documents: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        start, stop = self.documents
        return self.source.document_start(stop) - self.source.document_start(start)

    def less_than(self, tokens: int, needs: str) -> str | None:
        """Error text if there are fewer tokens than one sample ``needs``, else None."""
        if self.num_tokens >= tokens:
            return None
        start, stop = self.documents
        return (
            f"{self.source.prefix} supplies {stop - start} of its {self.source.num_documents} documents with "
            f"{self.num_tokens} tokens, less than one sample of {needs}"
        )


class SampleKind(Protocol):
    """Makes the datasets of a run out of corpora: samples for a GPT, BERT or T5."""

    def check(self, source: IndexedDataset) -> None:
        """Refuse a file that cannot give such samples.

        Raises:
            DataError: naming the file and what to do.
        """
        ...

    def shortage(self, corpus: Corpus) -> str | None:
        """Error text if a corpus is too small for one sample, else None."""
        ...

    def dataset(self, corpus: Corpus, num_samples: int, cache: ArrayCache) -> Dataset:
        """Samples of a corpus, repeated as often as it takes."""
        ...

    def mock(self, stream: int, num_samples: int) -> Dataset:
        """Synthetic samples; each ``stream`` has its own."""
        ...


def check_ids(tokens: np.ndarray, vocab_size: int, source: IndexedDataset) -> None:
    """Raises DataError if a token id is not of the vocabulary."""
    highest, lowest = int(tokens.max()), int(tokens.min())
    if highest >= vocab_size or lowest < 0:
        raise DataError(
            f"{bin_path(source.prefix)} holds token id {highest if lowest >= 0 else lowest}, but the vocabulary "
            f"has {vocab_size} ids: give the tokenizer the data was written with, or write the data again"
        )
