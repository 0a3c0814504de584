"""Samples for a decoder that predicts the next token.

One epoch of a corpus: its documents are shuffled and put end to end, and the resulting stream of T tokens is cut into
windows of S + 1 tokens that overlap by one, so that every token is the label of exactly one position. That gives
M = (T - 1) // S samples, which are shuffled again. What is left over, less than one sample, differs from epoch to epoch.

Both shuffles depend on (seed, epoch) alone. Megatron-LM shuffles the samples of all epochs together (the last one apart
if it supplies under 80% of an epoch), which makes the order depend on the length of the run; here every epoch is shuffled
apart, so that sample i is a pure function of (seed, i) and a longer run begins with the samples of the shorter one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lsh.data.cache import ArrayCache, Layout
from megatron_lsh.data.indexed import IndexedDataset, bin_path, idx_path
from megatron_lsh.data.samples.dataset import Sample, check_ids
from megatron_lsh.data.samples.epochs import EpochArrays
from megatron_lsh.errors import DataError

INDEX_FORMAT = 1  # raise it when the content of the cached arrays changes


@dataclass(frozen=True)
class SampleRules:
    """How tokens become model inputs.

    Attributes:
        eod: id that ends a document.
        vocab_size: ids must be below this.
        eod_mask_loss: no loss where the input is ``eod`` (the next token belongs to an unrelated document).
        reset_position_ids: positions start again after ``eod``.
        reset_attention_mask: add ``document_ids``, from which the model masks attention across documents.
    """

    eod: int
    vocab_size: int
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False


def make_sample(window: npt.NDArray[np.int64], rules: SampleRules) -> Sample:
    """Model inputs from a window of S + 1 tokens.

    Returns:
        tokens, labels, position_ids: int64 [S]; loss_mask: float32 [S]; with ``reset_attention_mask`` also document_ids:
        int64 [S], the number of documents that ended before each position (an ``eod`` belongs to what it ends).
    """
    tokens, labels = window[:-1], window[1:]
    length = len(tokens)
    loss_mask = np.ones(length, dtype=np.float32)
    position_ids = np.arange(length, dtype=np.int64)
    sample: Sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    if not (rules.eod_mask_loss or rules.reset_position_ids or rules.reset_attention_mask):
        return sample
    is_eod = tokens == rules.eod
    begins = np.concatenate([[False], is_eod[:-1]])  # first position of each further document
    if rules.eod_mask_loss:
        loss_mask[is_eod] = 0.0
    if rules.reset_position_ids:
        sample["position_ids"] = position_ids - np.maximum.accumulate(np.where(begins, position_ids, 0))
    if rules.reset_attention_mask:
        sample["document_ids"] = np.cumsum(begins, dtype=np.int64)
    return sample


class GPTDataset:
    """Samples from a range of documents of one indexed dataset.

    Args:
        source: the tokens.
        documents: (start, stop) range of documents to draw from.
        seq_length: S, tokens per sample.
        num_samples: length of the dataset; the corpus is repeated as often as that takes.
        seed: of both shuffles.
        rules: how tokens become model inputs.
        cache: keeps the index arrays.

    Raises:
        DataError: if the documents hold less than one sample.
    """

    def __init__(
        self,
        source: IndexedDataset,
        documents: tuple[int, int],
        seq_length: int,
        num_samples: int,
        seed: int,
        rules: SampleRules,
        cache: ArrayCache,
    ) -> None:
        self.source, self.documents, self.seq_length, self.seed, self.rules = source, documents, seq_length, seed, rules
        self.num_samples = num_samples
        self.tokens_per_epoch = source.document_start(documents[1]) - source.document_start(documents[0])
        self.samples_per_epoch = (self.tokens_per_epoch - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{source.prefix}: documents {documents[0]} to {documents[1]} hold {self.tokens_per_epoch} tokens, less "
                f"than one sample of --seq-length + 1 = {seq_length + 1}: use more data, a larger share of --split, or a "
                "shorter --seq-length"
            )
        self.num_epochs = -(-num_samples // self.samples_per_epoch)
        self._content = source.fingerprint
        self._epochs = EpochArrays(self._layout(), self.num_epochs, self._epoch, self._facts(), cache)

    def _facts(self) -> dict[str, object]:
        # The modification times catch edits that the fingerprint, a sample of the content, may miss.
        files = [path(self.source.prefix).stat() for path in (idx_path, bin_path)]
        return {
            "format": INDEX_FORMAT,
            "content": self._content,
            "modified": [file.st_mtime_ns for file in files],
            "documents": self.documents,
            "seq_length": self.seq_length,
            "seed": self.seed,
        }

    def _layout(self) -> Layout:
        n, m = self.documents[1] - self.documents[0], self.samples_per_epoch
        return {
            "documents": ((n,), np.dtype("<i4" if self.documents[1] < 2**31 else "<i8")),  # shuffled numbers
            "starts": ((n + 1,), np.dtype("<i8")),  # position of each shuffled document in the stream
            "samples": ((m,), np.dtype("<u4" if m < 2**32 else "<i8")),  # shuffled windows
        }

    def _epoch(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Index arrays of an epoch."""
        start, stop = self.documents
        lengths = np.diff(self.source.document_bounds(start, stop))
        # RandomState, because numpy freezes its streams for all versions to come; Generator's may change.
        state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        order = state.permutation(stop - start)
        starts = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        return order + start, starts, state.permutation(self.samples_per_epoch)

    def __len__(self) -> int:
        return self.num_samples

    def window(self, index: int) -> npt.NDArray[np.int64]:
        """The S + 1 tokens of a sample. Raises DataError if a file was cut off while it was in use."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        self.source.check_files()
        epoch, position = divmod(index, self.samples_per_epoch)
        arrays = self._epochs[epoch]
        starts, order = arrays["starts"], arrays["documents"]
        first = int(arrays["samples"][position]) * self.seq_length
        window = np.empty(self.seq_length + 1, dtype=np.int64)
        document = int(np.searchsorted(starts, first, side="right")) - 1
        filled, offset = 0, first - int(starts[document])
        while filled < len(window):
            take = min(int(starts[document + 1]) - int(starts[document]) - offset, len(window) - filled)
            begin = self.source.document_start(int(order[document])) + offset
            window[filled : filled + take] = self.source.tokens[begin : begin + take]
            filled, document, offset = filled + take, document + 1, 0
        return window

    def __getitem__(self, index: int) -> Sample:
        """Model inputs of a sample, see `make_sample`.

        Raises:
            DataError: if a token id is not of the vocabulary.
        """
        window = self.window(index)
        check_ids(window, self.rules.vocab_size, self.source)
        return make_sample(window, self.rules)

    def fingerprint(self) -> str:
        facts = (self._content, self.documents, self.seq_length, self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()
