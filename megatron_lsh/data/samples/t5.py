"""Samples for T5: spans of the text are cut out of the encoder's input, and the decoder writes them.

    text       Thank you for inviting me to your party last week
    encoder    Thank you <extra_id_0> me to your party <extra_id_1> week
    decoder    <start> <extra_id_0> for inviting <extra_id_1> last
    labels     <extra_id_0> for inviting <extra_id_1> last <end>

Span corruption (Raffel et al. 2019, arXiv:1910.10683, section 3.3.4): n = 15% of the L tokens, rounded, in k = n / 3 spans,
rounded, so that their mean length is 3. The n tokens are divided among the k spans uniformly over all divisions into
positive parts, which is the distribution of independent geometric lengths (Megatron-LM's) given their sum; so are the tokens
between the spans, of which there is at least one between two neighbours. (T5's own program never lets a span begin a
text and always lets one end it; here both may happen.) The spans take the sentinels in the order of the vocabulary's names.

Passages are so long that the encoder's input is full, and are shorter if the decoder's output would not fit otherwise.
They are packed within documents, as in Megatron-LM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lsh.config.t5 import T5Settings
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.samples.packing import Packing, Passage
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import ConfigError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class T5Recipe:
    """How a passage becomes a sample.

    Attributes:
        encoder_length, decoder_length: Se and Sd, special tokens and padding included.
        mask_prob: share of the tokens to cut out.
        mean_span: mean length of a span.
        short_seq_prob: share of the samples that aim at fewer tokens.
        sentinels: int64, ids that stand for the spans, in order.
        start, end: ids that begin the decoder's input and end its output.
        pad: id of padding.
        vocab_size: ids must be below this.
        text_ids: int64, ids that are not special.
    """

    encoder_length: int
    decoder_length: int
    mask_prob: float
    mean_span: float
    short_seq_prob: float
    sentinels: Ints
    start: int
    end: int
    pad: int
    vocab_size: int
    text_ids: Ints
    name: str = "T5"

    @classmethod
    def of(cls, settings: T5Settings, encoder_length: int, decoder_length: int, tokenizer: Tokenizer) -> T5Recipe:
        """The recipe of a run. The decoder starts with the tokenizer's ``bos``, or its ``pad`` as T5's own does.

        Raises:
            ConfigError: if the tokenizer lacks a token or sentinels, or a length is too short for any text.
        """
        start = tokenizer.pad if tokenizer.bos is None else tokenizer.bos
        if start is None:
            raise ConfigError(
                f"data.tokenizer_type ({tokenizer.name}): the vocabulary has neither a bos nor a pad token, and T5's "
                "decoder starts with one: name one in tokenizer_config.json, or use --tokenizer-type "
                "SentencePieceTokenizer, which adds its own"
            )
        recipe = cls(
            encoder_length,
            decoder_length,
            settings.mask_prob,
            settings.mean_noise_span_length,
            settings.short_seq_prob,
            sentinels=np.array(tokenizer.sentinels, dtype=np.int64),
            start=start,
            end=tokenizer.eod if tokenizer.eos is None else tokenizer.eos,
            pad=tokenizer.eod if tokenizer.pad is None else tokenizer.pad,
            vocab_size=tokenizer.vocab_size,
            text_ids=tokenizer.text_ids(),
        )
        if recipe.text_length < 2:
            raise ConfigError(
                f"t5.encoder_seq_length ({encoder_length}) must be at least 2 and t5.decoder_seq_length ({decoder_length}) "
                "at least 3: raise them"
            )
        spans = int(recipe._spans(np.arange(2, recipe.text_length + 1))[1].max())
        if spans > len(tokenizer.sentinels):
            raise ConfigError(
                f"data.vocab_extra_ids ({len(tokenizer.sentinels)} sentinels): a sample of t5.encoder_seq_length "
                f"({encoder_length}) has up to {spans} spans, and each needs a sentinel of its own: give --vocab-extra-ids "
                f"{max(spans, 100)}, or raise --mean-noise-span-length"
            )
        return recipe

    def _spans(self, lengths: Ints) -> tuple[Ints, Ints]:
        """(tokens to cut out, spans they lie in) of texts of these lengths, each at least 2."""
        noise = np.clip(np.rint(lengths * self.mask_prob), 1, lengths - 1).astype(np.int64)
        spans = np.clip(np.rint(noise / self.mean_span), 1, np.minimum(noise, lengths - noise + 1)).astype(np.int64)
        return noise, spans

    @property
    def text_length(self) -> int:
        """Length up to which every text fits both the encoder and the decoder; below 2 if none does."""
        lengths = np.arange(2, int(self.encoder_length / (1 - self.mask_prob)) + 3)
        noise, spans = self._spans(lengths)
        fits = (lengths - noise + spans <= self.encoder_length) & (noise + spans + 1 <= self.decoder_length)
        return int(np.argmin(np.append(fits, False))) + 1

    @property
    def packing(self) -> Packing:
        return Packing(self.text_length, self.short_seq_prob)

    def facts(self) -> tuple[object, ...]:
        """What a sample depends on besides its passage and its number, for fingerprints."""
        marks = (self.sentinels.tolist(), self.start, self.end, self.pad, self.vocab_size)
        return (self.name, self.encoder_length, self.decoder_length, self.mask_prob, self.mean_span, *marks)

    def sample(self, passage: Passage, state: np.random.RandomState) -> Sample:
        """Model inputs.

        Returns:
            encoder_tokens: int64 [Se], encoder_padding_mask: bool [Se], True for tokens; decoder_tokens, labels: int64 [Sd];
            decoder_padding_mask: bool [Sd]; loss_mask: float32 [Sd], 1 where there is a label.
        """
        tokens = passage.tokens
        span = self._span_of(len(tokens), state)
        begins = (span >= 0) & (np.append(-1, span[:-1]) != span)
        stands = np.where(begins, self.sentinels[span], tokens)
        noise = np.flatnonzero(span >= 0)
        labels = np.insert(tokens[noise], np.flatnonzero(begins[noise]), stands[begins])
        labels = np.append(labels, self.end)
        encoder, encoder_mask = _padded(stands[begins | (span < 0)], self.encoder_length, self.pad)
        decoder, decoder_mask = _padded(np.append(self.start, labels[:-1]), self.decoder_length, self.pad)
        return {
            "encoder_tokens": encoder,
            "encoder_padding_mask": encoder_mask,
            "decoder_tokens": decoder,
            "decoder_padding_mask": decoder_mask,
            "labels": _padded(labels, self.decoder_length, self.pad)[0],
            "loss_mask": decoder_mask.astype(np.float32),
        }

    def _span_of(self, length: int, state: np.random.RandomState) -> Ints:
        """int64 [length]: number of the span that a token is in, -1 for those that stay."""
        noise, spans = (int(count[0]) for count in self._spans(np.array([length])))
        cut_out = _divide(noise, spans, state)
        stay = _divide(length - noise + 2, spans + 1, state)
        stay[[0, -1]] -= 1  # the first and the last may be empty
        runs = np.empty(2 * spans + 1, dtype=np.int64)
        runs[0::2], runs[1::2] = stay, cut_out
        numbers = np.full(2 * spans + 1, -1, dtype=np.int64)
        numbers[1::2] = np.arange(spans)
        return np.repeat(numbers, runs)


def _divide(total: int, parts: int, state: np.random.RandomState) -> Ints:
    """int64 [parts]: positive numbers that add up to ``total``, uniformly over all ways to do so."""
    cuts = np.sort(state.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _padded(tokens: Ints, length: int, pad: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """(tokens and padding, which of them are tokens), both [length]."""
    padded = np.full(length, pad, dtype=np.int64)
    padded[: len(tokens)] = tokens
    return padded, np.arange(length) < len(tokens)
