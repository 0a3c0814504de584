"""Sentences of a corpus put together to passages, the texts of BERT's and T5's samples.

A passage is a run of whole sentences with at most ``length`` tokens, as many of them as fit. With a probability of
``short_share`` it aims at fewer tokens, uniformly drawn from 2 to ``length``, so that a model also sees short texts
(Devlin et al. 2018, arXiv:1810.04805, appendix A.2). A sentence that is too long is cut into equal pieces, so that no token
is lost: every token of the corpus is in exactly one passage, except ends of documents that are too short.

The corpus is packed once, by the seed alone. Each epoch reads all passages in another order, and what is drawn at random
inside a sample (segments, masks, spans) depends on its number, so it differs from epoch to epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lsh.data.cache import ArrayCache, Entry, Layout, Rows, cache_key
from megatron_lsh.data.indexed import bin_path, idx_path
from megatron_lsh.data.samples.dataset import Corpus, check_ids
from megatron_lsh.data.samples.epochs import EpochArrays
from megatron_lsh.errors import DataError

PACK_FORMAT = 1  # raise it when the content of the cached arrays changes
DRAWS = 4096  # lengths drawn at a time
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """How sentences become passages.

    Attributes:
        length: most tokens of a passage.
        short_share: probability of a shorter aim.
        shortest: what is left at the end of a document with fewer tokens gives no passage.
        across_documents: documents are shuffled and put end to end, and passages run over their ends, each of which costs a
            token for the separator between them. Otherwise a passage ends with its document.
    """

    length: int
    short_share: float = 0.0
    shortest: int = 2
    across_documents: bool = False

    @property
    def longest_piece(self) -> int:
        """Pieces are at most so long that one fits behind what is too short for a passage of its own."""
        return max(1, self.length - (self.shortest - 1) * (2 if self.across_documents else 1))


class Passage(NamedTuple):
    """Text of one sample.

    Attributes:
        tokens: int64 [n].
        sentences: int64, position in ``tokens`` of the first token of each sentence; the first is 0.
        documents: int64, position of the first token of each document but the first.
    """

    tokens: Ints
    sentences: Ints
    documents: Ints


class _Pieces(NamedTuple):
    """Sentences, long ones in pieces, in the order of packing. int64 [pieces], and bool for ``opens``."""

    starts: Ints  # position in the .bin file's tokens
    lengths: Ints
    opens: npt.NDArray[np.bool_]  # first of its document


def _cut(corpus: Corpus, packing: Packing, seed: int) -> _Pieces:
    """All sentences with tokens of the corpus, those too long in equal pieces."""
    source, (start, stop) = corpus
    index = np.asarray(source.document_index[start : stop + 1])
    lengths = np.asarray(source.lengths[index[0] : index[-1]], dtype=np.int64)
    starts = np.asarray(source.offsets[index[0] : index[-1]]) // source.dtype.itemsize
    document = np.repeat(np.arange(stop - start), np.diff(index))
    if packing.across_documents:
        document = np.random.RandomState(seed % 2**32).permutation(stop - start)[document]
        order = np.argsort(document, kind="stable")
        lengths, starts, document = lengths[order], starts[order], document[order]
    count = -(-lengths // packing.longest_piece)
    sentence = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(sentence)) - (np.cumsum(count) - count)[sentence]
    begin = lengths[sentence] * number // count[sentence]
    end = lengths[sentence] * (number + 1) // count[sentence]
    owner = document[sentence]
    opens = np.concatenate([np.ones(min(len(owner), 1), dtype=bool), owner[1:] != owner[:-1]])
    return _Pieces(starts[sentence] + begin, end - begin, opens)


def _pack(pieces: _Pieces, packing: Packing, seed: int) -> tuple[Ints, Ints]:
    """(first piece, piece after the last) of each passage. One step of Python per passage, none per sentence or token."""
    aims = _aims(packing, seed)
    separators = pieces.opens if packing.across_documents else np.zeros(len(pieces.opens), dtype=bool)
    # Tokens before each piece, separators included; a memoryview is read faster than an array, one number at a time.
    before = np.concatenate([[0], np.cumsum(pieces.lengths + separators)]).data
    separator = separators.view(np.uint8).data
    bounds = [0] if packing.across_documents else np.flatnonzero(pieces.opens).tolist()
    firsts: list[int] = []
    ends: list[int] = []
    for first, stop in pairwise([*bounds, len(pieces.lengths)]):
        while first < stop:
            base, aim = before[first] + separator[first], next(aims)
            end = bisect_right(before, base + aim, first + 1, min(stop, first + aim) + 1) - 1
            end = max(end, first + 1)  # one sentence at least, even if it is longer than a short aim
            while before[end] - base < packing.shortest and end < stop:
                end += 1
            if before[end] - base >= packing.shortest:
                firsts.append(first)
                ends.append(end)
            first = end
    return np.array(firsts, dtype=np.int64), np.array(ends, dtype=np.int64)


def _aims(packing: Packing, seed: int) -> Iterator[int]:
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 1 << 32])))
    while True:
        short = state.random_sample(DRAWS) < packing.short_share
        yield from np.where(short, state.randint(2, packing.length + 1, size=DRAWS), packing.length).tolist()


class PackedPassages:
    """Passages of one corpus in the order of training.

    Args:
        num_samples: length; the corpus is repeated as often as that takes.
        seed: of packing and of every epoch's order.
        vocab_size: token ids must be below this.
        cache: keeps the index arrays.

    Raises:
        DataError: if the corpus gives no passage.
    """

    def __init__(
        self, corpus: Corpus, packing: Packing, num_samples: int, seed: int, vocab_size: int, cache: ArrayCache
    ) -> None:
        self.corpus, self.packing, self.num_samples, self.seed = corpus, packing, num_samples, seed
        self._vocab_size = vocab_size
        self._content = corpus.source.fingerprint
        self._cache = cache
        self._arrays = self._packed()
        self.samples_per_epoch = self._arrays["firsts"].shape[1]
        if not self.samples_per_epoch:
            raise DataError(
                f"{corpus.source.prefix}: documents {corpus.documents[0]} to {corpus.documents[1]} have no text of "
                f"{packing.shortest} tokens: use more data or a larger share of --split"
            )
        self.num_epochs = -(-num_samples // self.samples_per_epoch)
        number = np.dtype("<u4" if self.samples_per_epoch < 2**32 else "<i8")
        layout: Layout = {"samples": ((self.samples_per_epoch,), number)}
        self._epochs = EpochArrays(layout, self.num_epochs, self._order, self._facts() | {"of": "order"}, cache)

    def _facts(self) -> dict[str, object]:
        # The modification times catch edits that the fingerprint, a sample of the content, may miss.
        files = [path(self.corpus.source.prefix).stat() for path in (idx_path, bin_path)]
        return {
            "pack_format": PACK_FORMAT,
            "content": self._content,
            "modified": [file.st_mtime_ns for file in files],
            "documents": self.corpus.documents,
            "packing": asdict(self.packing),
            "seed": self.seed,
        }

    def _packed(self) -> Entry:
        """Pieces and passages. How many there are is an entry of its own: the cache wants to know before it reads."""
        made: list[tuple[_Pieces, tuple[Ints, Ints]]] = []

        def make() -> tuple[_Pieces, tuple[Ints, Ints]]:
            if not made:
                pieces = _cut(self.corpus, self.packing, self.seed)
                made.append((pieces, _pack(pieces, self.packing, self.seed)))
            return made[0]

        def sizes() -> Rows:
            pieces, (firsts, _) = make()
            yield (np.array([len(pieces.lengths), len(firsts)]),)

        def arrays() -> Rows:
            pieces, passages = make()
            yield (*pieces, *passages)

        facts = self._facts()
        size = self._cache.get(cache_key(**facts, of="sizes"), {"sizes": ((1, 2), np.dtype("<i8"))}, sizes)["sizes"][0]
        pieces, passages = int(size[0]), int(size[1])
        layout: Layout = {
            "starts": ((1, pieces), np.dtype("<i8")),
            "lengths": ((1, pieces), np.dtype("<i4")),
            "opens": ((1, pieces), np.dtype("?")),
            "firsts": ((1, passages), np.dtype("<i8")),
            "ends": ((1, passages), np.dtype("<i8")),
        }
        return self._cache.get(cache_key(**facts, of="passages"), layout, arrays)

    def _order(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Order of the passages in an epoch."""
        # RandomState, because numpy freezes its streams for all versions to come; Generator's may change.
        state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        return (state.permutation(self.samples_per_epoch),)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Passage:
        """Text of a sample.

        Raises:
            DataError: if a token id is not of the vocabulary, or a file was cut off while it was in use.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        self.corpus.source.check_files()
        if not self._arrays.is_whole():
            self._arrays = self._packed()
        arrays = {name: array[0] for name, array in self._arrays.items()}
        epoch, position = divmod(index, self.samples_per_epoch)
        passage = int(self._epochs[epoch]["samples"][position])
        first, end = int(arrays["firsts"][passage]), int(arrays["ends"][passage])
        starts, lengths = arrays["starts"][first:end], arrays["lengths"][first:end].astype(np.int64)
        sentences = np.cumsum(lengths) - lengths
        # The token at position p of the passage lies at p + (start of its piece in the file - start of it here).
        where = np.arange(int(lengths.sum())) + np.repeat(starts - sentences, lengths)
        tokens = self.corpus.source.tokens[where].astype(np.int64)
        check_ids(tokens, self._vocab_size, self.corpus.source)
        return Passage(tokens, sentences, sentences[1:][arrays["opens"][first + 1 : end]])

    def fingerprint(self) -> str:
        facts = (self._content, self.corpus.documents, asdict(self.packing), self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()
