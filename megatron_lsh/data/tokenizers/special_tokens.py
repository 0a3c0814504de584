"""What all tokenizers have in common: the special tokens that models ask for by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt


class SpecialTokens:
    """Ids of the special tokens; a tokenizer class fills in those it has.

    Attributes:
        vocab_size: number of ids, special ones included (before padding for the embedding).
        eod: id that ends a document.
        cls, sep, mask: ids of BERT's three marks, None where the vocabulary lacks one.
        pad, bos, eos: ids of padding, beginning and end of a sequence, None where the vocabulary lacks one.
        sentinels: ids of T5's <extra_id_0>, <extra_id_1>, ... in this order.
    """

    vocab_size: int
    eod: int
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    sentinels: Sequence[int] = ()

    def _find_sentinels(self, id_of: Callable[[str], int | None], wanted: int) -> None:
        """Fill in ``sentinels``: those of the vocabulary, then as many new ids after it as make ``wanted`` (if more)."""
        own: list[int] = []
        while (found := id_of(f"<extra_id_{len(own)}>")) is not None:
            own.append(found)
        missing = max(wanted - len(own), 0)
        self.sentinels = [*own, *range(self.vocab_size, self.vocab_size + missing)]
        self.vocab_size += missing

    def text_ids(self) -> npt.NDArray[np.int64]:
        """All ids that are not special, ascending: what a random token may be."""
        named = (self.eod, self.cls, self.sep, self.mask, self.pad, self.bos, self.eos, *self.sentinels)
        return np.delete(np.arange(self.vocab_size), [i for i in named if i is not None])

    def continues_word(self) -> npt.NDArray[np.bool_] | None:
        """bool [vocab_size]: which tokens belong to the same word as the token before; None if that is not known."""
        return None


def digest(*parts: object) -> str:
    """Hash of some facts."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
