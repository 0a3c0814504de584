"""Samples for classification without training: a prompt for each text, continued by the name of each class in turn.

The continuation is what tokenizing ``prompt + " " + name`` adds to, or changes in, tokenizing the prompt alone, so that it
does not matter whether the tokenizer joins the space with the name. A text that is too long is shortened at its end, such
that the end of the prompt remains. Legend: S --seq-length, C classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lsh.data.samples.classification import BLANK
from megatron_lsh.data.samples.gpt import Sample
from megatron_lsh.data.samples.labelled_texts import Example, Labelled
from megatron_lsh.data.samples.prompts import prompt_ids
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """How texts become prompts. `names`: what the classes are called in them."""

    template: str
    names: Sequence[str]
    length: int
    """S"""
    truncate: bool

    def rows(self, example: Example, tokenizer: Tokenizer) -> tuple[list[tuple[list[int], int]], bool]:
        """(per class the tokens, at most S + 1, and the position of the continuation's first; whether the text was cut).

        Raises:
            DataError: too long without truncation, or even with an empty text.
        """
        texts = list(example.texts)
        cut = False
        while True:
            # At once: an example's own text may have braces.
            parts = {"{text}": texts[0], "{pair}": texts[1] if len(texts) > 1 else ""}
            prompt = "".join(parts.get(piece, piece) for piece in re.split(r"(\{text\}|\{pair\})", self.template))
            rows = [_continued(tokenizer, prompt, name) for name in self.names]
            excess = max(len(tokens) for tokens, _ in rows) - (self.length + 1)
            if excess <= 0:
                return rows, cut
            if not self.truncate:
                raise DataError(
                    f"{example.where}: with its prompt the text is {excess} tokens too long for --seq-length {self.length}: "
                    "raise --seq-length, or drop --no-truncate"
                )
            cut = True
            longest = max(range(len(texts)), key=lambda place: len(texts[place]))
            ids = tokenizer.tokenize(texts[longest])
            if not texts[longest]:
                raise DataError(
                    f"--prompt-template and the class names leave no room for a text in --seq-length {self.length}: "
                    "shorten them"
                )
            shorter = tokenizer.detokenize(ids[: max(len(ids) - excess, 0)]).rstrip("\ufffd")
            # A shortened text may tokenize differently; drop a character so that the loop ends.
            texts[longest] = shorter[: len(texts[longest]) - 1]


def _continued(tokenizer: Tokenizer, prompt: str, name: str) -> tuple[list[int], int]:
    alone, tokens = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, f"{prompt} {name}")
    start = 0
    while start < min(len(alone), len(tokens) - 1) and alone[start] == tokens[start]:
        start += 1
    if start == 0:  # nothing to predict the first token from
        return [tokenizer.eod, *tokens], 1
    return tokens, start


class ZeroShotSet:
    """Prompts of all texts of a set, each continued by all classes.

    Samples have tokens, labels int64 [C, S], padding_mask bool [C, S], loss_mask float32 [C, S] (1 where the label belongs
    to the continuation) and label int64 []; see ``ClassificationSet``, in whose place ``EvaluationOrder`` takes it.
    """

    def __init__(self, part: Labelled, classes: Sequence[str], prompt: Prompt, tokenizer: Tokenizer) -> None:
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = [numbers[example.label] for example in part.examples]
        self._prompt, self._pad = prompt, tokenizer.pad if tokenizer.pad is not None else tokenizer.eod
        self._rows = []
        self.truncated = 0
        for example in part.examples:
            rows, cut = prompt.rows(example, tokenizer)
            self._rows.append(rows)
            self.truncated += cut

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> Sample:
        """The prompts of this text, or a blank sample for `BLANK`."""
        shape = (len(self._prompt.names), self._prompt.length)
        tokens, labels = (np.full(shape, self._pad, dtype=np.int64) for _ in range(2))
        padding_mask, loss_mask = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32)
        for row, (ids, start) in enumerate(self._rows[index] if index != BLANK else ()):
            count = len(ids) - 1
            tokens[row, :count], labels[row, :count] = ids[:-1], ids[1:]
            padding_mask[row, :count] = True
            loss_mask[row, start - 1 : count] = 1.0
        label = np.asarray(BLANK if index == BLANK else self.labels[index], dtype=np.int64)
        return {
            "tokens": tokens,
            "labels": labels,
            "padding_mask": padding_mask,
            "loss_mask": loss_mask,
            "label": label,
        }

    def fingerprint(self) -> str:
        facts = (self._rows, self.labels, self._prompt.length, self._pad)
        return hashlib.sha256(repr(facts).encode()).hexdigest()
