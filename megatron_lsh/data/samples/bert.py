"""Samples for BERT and RoBERTa: masked tokens and, for BERT, two segments in right or swapped order.

With the binary head (BERT): ``[CLS] A [SEP] B [SEP]``, where A and B are consecutive parts of one document, cut between
two sentences drawn at random. In half of the samples they are swapped, and the head tells which: the sentence-order task of
ALBERT (Lan et al. 2019, arXiv:1909.11942, section 3.1), as in Megatron-LM, not the original's sentences of another
document. A passage that is a single sentence is cut inside it, so that no document is left out.

Without it (RoBERTa, Liu et al. 2019, arXiv:1907.11692, section 4.2, FULL-SENTENCES): ``[CLS] text [SEP]``, packed across the
ends of documents with one more [SEP] at each. (RoBERTa has no short samples either: --short-seq-prob 0.)

Masking (Devlin et al. 2018, arXiv:1810.04805, section 3.1): 15% of the text's tokens are predicted; of these 80% are
replaced by [MASK], 10% by a random token and 10% stay. As in Megatron-LM they are chosen as n-grams of n = 1, 2 or 3 whole
words, with probabilities in proportion to 1/n (where the tokenizer cannot tell words, each token is one). The masks depend
on (seed, index), so every epoch has its own: RoBERTa's dynamic masking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lsh.config.bert import BertSettings
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.samples.packing import Packing, Passage
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import ConfigError

MASKED, RANDOM = 0.8, 0.1  # shares of the predicted tokens that are replaced by the mask and by a random token
MAX_NGRAM = 3
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BertRecipe:
    """How a passage becomes a sample.

    Attributes:
        seq_length: S, tokens of a sample, special tokens and padding included.
        mask_prob: share of the text's tokens to predict.
        short_seq_prob: share of the samples that aim at fewer tokens.
        binary_head: two segments instead of one.
        cls, sep, mask, pad: ids of the special tokens.
        vocab_size: ids must be below this.
        text_ids: int64, what a random token may be.
        continues_word: bool [vocab_size], tokens that belong to the word of the token before; None: none do.
    """

    seq_length: int
    mask_prob: float
    short_seq_prob: float
    binary_head: bool
    cls: int
    sep: int
    mask: int
    pad: int
    vocab_size: int
    text_ids: Ints
    continues_word: npt.NDArray[np.bool_] | None = None
    name: str = "BERT"

    @classmethod
    def of(cls, settings: BertSettings, seq_length: int, tokenizer: Tokenizer) -> BertRecipe:
        """The recipe of a run.

        Raises:
            ConfigError: if the tokenizer lacks a special token, or the samples are too short for any text.
        """
        least = 5 if settings.bert_binary_head else 4
        if seq_length < least:
            raise ConfigError(
                f"model.seq_length ({seq_length}) must be at least {least}, which [CLS], [SEP] and two tokens take: raise "
                "--seq-length"
            )
        return cls(
            seq_length,
            settings.mask_prob,
            settings.short_seq_prob,
            settings.bert_binary_head,
            cls=_required(tokenizer, "cls"),
            sep=_required(tokenizer, "sep"),
            mask=_required(tokenizer, "mask"),
            pad=tokenizer.eod if tokenizer.pad is None else tokenizer.pad,
            vocab_size=tokenizer.vocab_size,
            text_ids=tokenizer.text_ids(),
            continues_word=tokenizer.continues_word(),
        )

    @property
    def packing(self) -> Packing:
        if self.binary_head:
            return Packing(self.seq_length - 3, self.short_seq_prob)
        return Packing(self.seq_length - 2, self.short_seq_prob, shortest=1, across_documents=True)

    def facts(self) -> tuple[object, ...]:
        """What a sample depends on besides its passage and its number, for fingerprints."""
        marks = (self.cls, self.sep, self.mask, self.pad, self.vocab_size, MAX_NGRAM)
        return (self.name, self.seq_length, self.mask_prob, self.binary_head, *marks)

    def sample(self, passage: Passage, state: np.random.RandomState) -> Sample:
        """Model inputs.

        Returns:
            tokens, token_types, labels: int64 [S], labels being the original ids where ``loss_mask`` is 1, else 0;
            loss_mask: float32 [S]; padding_mask: bool [S], True for tokens; with the binary head is_random: int64 [], 1
            where the segments are swapped.
        """
        sample: Sample = {}
        sequence = np.full(self.seq_length, self.pad, dtype=np.int64)
        types = np.zeros(self.seq_length, dtype=np.int64)
        is_text = np.zeros(self.seq_length, dtype=bool)
        if self.binary_head:
            first, second = _two_segments(passage, state)
            swapped = state.random_sample() < 0.5
            if swapped:
                first, second = second, first
            parts = [first, second]
            sample["is_random"] = np.array(int(swapped), dtype=np.int64)
        else:
            parts = np.split(passage.tokens, passage.documents)
        sequence[0], at = self.cls, 1
        begins = np.zeros(self.seq_length, dtype=bool)  # the first token of a part begins a word, whatever it is
        for number, part in enumerate(parts):
            end = at + len(part)
            sequence[at:end], sequence[end] = part, self.sep
            is_text[at:end], begins[at] = True, True
            if self.binary_head:
                types[at : end + 1] = number
            at = end + 1
        words = begins | (is_text if self.continues_word is None else is_text & ~self.continues_word[sequence])
        predicted = _choose(np.flatnonzero(is_text), words, self.mask_prob, state)
        sample["labels"] = np.zeros(self.seq_length, dtype=np.int64)
        sample["labels"][predicted] = sequence[predicted]
        sample["loss_mask"] = np.zeros(self.seq_length, dtype=np.float32)
        sample["loss_mask"][predicted] = 1.0
        draw = state.random_sample(len(predicted))
        other = self.text_ids[state.randint(len(self.text_ids), size=len(predicted))]
        kept = np.where(draw < MASKED + RANDOM, other, sequence[predicted])
        sequence[predicted] = np.where(draw < MASKED, self.mask, kept)
        return sample | {"tokens": sequence, "token_types": types, "padding_mask": np.arange(self.seq_length) < at}


def _required(tokenizer: Tokenizer, mark: str) -> int:
    found: int | None = getattr(tokenizer, mark)
    if found is None:
        raise ConfigError(
            f"data.tokenizer_type ({tokenizer.name}): the vocabulary has no {mark} token, which BERT needs: use one that "
            f"has it (a line [{mark.upper()}] in --vocab-file, a {mark}_token in tokenizer_config.json), or "
            "--tokenizer-type SentencePieceTokenizer, which adds its own"
        )
    return found


def _two_segments(passage: Passage, state: np.random.RandomState) -> tuple[Ints, Ints]:
    """A passage cut between two of its sentences, or within its only one."""
    if len(passage.sentences) > 1:
        cut = int(passage.sentences[state.randint(1, len(passage.sentences))])
    else:
        cut = state.randint(1, len(passage.tokens))
    return passage.tokens[:cut], passage.tokens[cut:]


def _choose(positions: Ints, begins_word: npt.NDArray[np.bool_], share: float, state: np.random.RandomState) -> Ints:
    """Positions of the tokens to predict, ascending: n-grams of whole words until the budget is spent.

    The budget is ``share`` of the tokens, rounded, at least 1. An n-gram that exceeds what is left of it, or the end of a
    segment, loses words from its end; one that touches an earlier one is passed over.

    Args:
        positions: of the text's tokens, ascending.
        begins_word: bool [S].
    """
    left = max(1, round(share * len(positions)))
    bounds = np.append(np.flatnonzero(begins_word[positions]), len(positions))  # of words, in ``positions``
    count = len(bounds) - 1
    weights = 1.0 / np.arange(1, MAX_NGRAM + 1)
    sizes = 1 + np.searchsorted(np.cumsum(weights / weights.sum())[:-1], state.random_sample(count), side="right")
    starts, place, wanted = bounds.tolist(), positions.tolist(), sizes.tolist()
    covered = bytearray(count)
    chosen: list[int] = []
    for word in state.permutation(count).tolist():
        if not left:
            break
        size, begin = min(wanted[word], count - word), starts[word]
        while size:
            tokens = starts[word + size] - begin
            if tokens <= left and place[begin + tokens - 1] - place[begin] == tokens - 1:
                break
            size -= 1
        if not size or any(covered[word : word + size]):
            continue
        covered[word : word + size] = b"\x01" * size
        left -= tokens
        chosen += place[begin : begin + tokens]
    if not chosen:  # every word is longer than the budget, as a single long one may be
        chosen = state.permutation(positions)[:left].tolist()
    return np.sort(np.array(chosen, dtype=np.int64))
