"""Samples for classification: texts tokenized once, cut to the model's length, padded.

S is --seq-length, C the number of classes. Training samples are numbered through all epochs: epoch e reads every text once
in an order that depends on (seed, e) alone, and its last global batch is filled up with the first texts of that order.
Evaluation sets hold every text once, followed by blank samples (label -1, nothing but padding) up to whole batches.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_lsh.data.samples.gpt import Sample
from megatron_lsh.data.samples.labelled_texts import Example, Labelled
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import DataError

BLANK = -1
"""label of a sample that only fills a batch"""


@dataclass(frozen=True)
class Encoding:
    """How a backbone reads one text or a pair.

    gpt: ``a eod`` or ``a eod b eod``; bert: ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]``, token type 1 from b on; t5: as
    gpt with its end-of-sentence id.
    """

    start: tuple[int, ...]
    end: int
    pad: int
    length: int
    """S"""
    truncate: bool

    @classmethod
    def of(cls, backbone: str, tokenizer: Tokenizer, length: int, truncate: bool) -> Encoding:
        """Raises DataError if the tokenizer lacks a special token that the backbone needs."""
        pad = tokenizer.pad if tokenizer.pad is not None else tokenizer.eod
        if backbone != "bert":
            eos = getattr(tokenizer, "eos", None) if backbone == "t5" else None
            return cls((), eos if eos is not None else tokenizer.eod, pad, length, truncate)
        start, end = getattr(tokenizer, "cls", None), getattr(tokenizer, "sep", None)
        if start is None or end is None:
            raise DataError(
                f"{tokenizer.name} has no [CLS] or [SEP] token, which --backbone bert needs: use the tokenizer that the "
                "model was pretrained with"
            )
        return cls((start,), end, pad, length, truncate)

    def bare(self, ids: list[int]) -> list[int]:
        """Without the special tokens that some tokenizers put around a text by themselves."""
        if self.start and ids[:1] == [*self.start]:
            ids = ids[1:]
        return ids[:-1] if ids and ids[-1] == self.end else ids

    def encode(self, parts: Sequence[list[int]], where: str) -> tuple[list[int], int, bool]:
        """(ids, position from which they belong to the second text, whether something was cut off).

        Of a pair the longer text is cut first, token by token, until both fit.

        Raises:
            DataError: too long without truncation, or no token at all.
        """
        room = self.length - len(self.start) - len(parts)
        if room < len(parts):
            raise DataError(
                f"{where}: --seq-length {self.length} leaves {max(room, 0)} tokens for {len(parts)} texts beside the "
                "special ones: raise it"
            )
        lengths = [len(part) for part in parts]
        if min(lengths) == 0:
            raise DataError(f"{where}: the tokenizer makes no token of the text: correct or remove it")
        if sum(lengths) > room and not self.truncate:
            raise DataError(
                f"{where}: the text has {sum(lengths)} tokens, more than the {room} that --seq-length {self.length} leaves: "
                "raise --seq-length (up to --max-position-embeddings), or drop --no-truncate"
            )
        kept = list(lengths)
        if len(kept) == 2 and sum(kept) > room:
            shorter = min(kept[0], kept[1], room // 2)
            first_is_shorter = kept[0] <= kept[1]
            kept = [shorter, room - shorter] if first_is_shorter else [room - shorter, shorter]
        else:
            kept[0] = min(kept[0], room)
        ids = [*self.start, *parts[0][: kept[0]], self.end]
        second = len(ids)
        for part, count in zip(parts[1:], kept[1:], strict=True):
            ids += [*part[:count], self.end]
        return ids, second, kept != lengths


class ExampleSet(Protocol):
    """Samples by number, and a blank one for `BLANK`."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...

    def fingerprint(self) -> str: ...


class ClassificationSet:
    """All texts of one set as token ids.

    Samples have tokens and token_types int64 [S], padding_mask bool [S] (True = real), label int64 [] (`BLANK` for a
    sample that only fills a batch, and is nothing but padding).
    """

    def __init__(
        self, what: str, ids: list[list[int]], seconds: list[int], labels: list[int], encoding: Encoding
    ) -> None:
        self.what, self.encoding = what, encoding
        self.labels = np.asarray(labels, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)])
        self._ids = np.fromiter((i for row in ids for i in row), dtype=np.int32, count=int(self._starts[-1]))
        self._seconds = np.asarray(seconds, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mean_length(self) -> float:
        """Tokens per text, special ones included."""
        return float(self._starts[-1]) / max(len(self), 1)

    def sample(self, index: int) -> Sample:
        """The text of this number, or a blank sample for `BLANK`."""
        length = self.encoding.length
        tokens = np.full(length, self.encoding.pad, dtype=np.int64)
        types, mask = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=bool)
        if index == BLANK:
            return {
                "tokens": tokens,
                "token_types": types,
                "padding_mask": mask,
                "label": np.asarray(BLANK, dtype=np.int64),
            }
        ids = self._ids[self._starts[index] : self._starts[index + 1]]
        tokens[: len(ids)] = ids
        mask[: len(ids)] = True
        types[self._seconds[index] : len(ids)] = 1
        return {"tokens": tokens, "token_types": types, "padding_mask": mask, "label": self.labels[index]}

    def fingerprint(self) -> str:
        facts = (self.encoding, hashlib.sha256(self._ids.tobytes() + self.labels.tobytes()).hexdigest())
        return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass(frozen=True)
class ClassificationData:
    """The sets of a run, tokenized. `truncated`: texts that were cut, by set."""

    classes: list[str]
    train: ClassificationSet | None
    valid: ClassificationSet | None
    test: ClassificationSet | None
    truncated: Mapping[str, int]

    def describe(self) -> list[str]:
        """One line per set."""
        lines = []
        for name in ("train", "valid", "test"):
            part: ClassificationSet | None = getattr(self, name)
            if part is None:
                continue
            cut, length = self.truncated[name], part.encoding.length
            fate = f"{cut:,} were cut to {length} tokens ({cut / len(part):.1%})" if cut else "none was cut"
            mean = f"{part.mean_length:.0f} tokens on average"
            lines.append(f"{name} set: {len(part):,} texts of {len(self.classes)} classes, {mean}; {fate}")
        return lines


def class_names(sets: Mapping[str, Labelled], given: Sequence[str] | None) -> list[str]:
    """The classes in the order of their numbers: as given, as the data set names them, or sorted from the training texts.

    Raises:
        DataError: fewer than two, one without a training text, or a label in any set that is none of them.
    """
    train = sets.get("train")
    counts = Counter(example.label for example in train.examples) if train is not None else Counter()
    named = next((part.names for part in sets.values() if part.names is not None), None)
    names = list(given or named or sorted(counts, key=numbers_first))
    if not names:
        raise DataError("the classes are not known without training texts: give --classes, or --train-data")
    if len(names) < 2:
        raise DataError(
            f"{train.what if train is not None else '--classes'} has one class ({names[0]}), and there must be at least 2: "
            "check --label-key"
        )
    missing = [name for name in names if train is not None and not counts[name]]
    if train is not None and missing:
        raise DataError(
            f"{train.what} has no text of class {missing[0]}: a class that is never seen cannot be learned; add texts, or "
            "leave it out of --classes"
        )
    for part in sets.values():
        for example in part.examples:
            if example.label not in names:
                raise DataError(
                    f"{example.where}: the label ({example.label}) must be one of the {len(names)} classes "
                    f"({some_names(names)}): correct it, or name all classes with --classes"
                )
    return names


def tokenize_sets(
    sets: Mapping[str, Labelled], classes: Sequence[str], tokenizer: Tokenizer, encoding: Encoding
) -> ClassificationData:
    """Token ids of all texts. Raises DataError, naming the text, see `Encoding.encode`."""
    numbers = {name: number for number, name in enumerate(classes)}
    tokenized, truncated = {}, {}
    for name, part in sets.items():
        rows = [_encode(example, tokenizer, encoding) for example in part.examples]
        labels = [numbers[example.label] for example in part.examples]
        tokenized[name] = ClassificationSet(
            part.what, [ids for ids, _, _ in rows], [second for _, second, _ in rows], labels, encoding
        )
        truncated[name] = sum(cut for _, _, cut in rows)
    return ClassificationData(
        list(classes), tokenized.get("train"), tokenized.get("valid"), tokenized.get("test"), truncated
    )


def _encode(example: Example, tokenizer: Tokenizer, encoding: Encoding) -> tuple[list[int], int, bool]:
    return encoding.encode([encoding.bare(tokenizer.tokenize(text)) for text in example.texts], example.where)


def samples_per_epoch(examples: int, batch: int) -> int:
    """Samples from one end of an epoch to the next: whole global batches."""
    return -(-examples // batch) * batch


def epoch_orders(examples: int, seed: int) -> Callable[[int], npt.NDArray[np.int64]]:
    """epoch -> the numbers of so many examples in an order that depends on (seed, epoch) alone."""

    @lru_cache(maxsize=2)  # of the epoch that is read, and the next one
    def order(epoch: int) -> npt.NDArray[np.int64]:
        state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
        return state.permutation(examples)

    return order


class TrainingOrder:
    """Training samples in the order of the run; a ``Dataset``. `samples_per_epoch`: whole global batches, see above."""

    def __init__(self, source: ClassificationSet, batch: int, seed: int, num_samples: int) -> None:
        self._source, self._seed, self._num_samples = source, seed, num_samples
        self.samples_per_epoch = samples_per_epoch(len(source), batch)
        self._order = epoch_orders(len(source), seed)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        epoch, place = divmod(index, self.samples_per_epoch)
        return self._source.sample(int(self._order(epoch)[place % len(self._source)]))

    def fingerprint(self) -> str:
        """Of the texts and their order, which the batch size does not change."""
        return hashlib.sha256(f"{self._source.fingerprint()} {self._seed}".encode()).hexdigest()


class EvaluationOrder:
    """Every example once, then blank samples up to a multiple of `multiple` (samples of one micro-step of all ranks)."""

    def __init__(self, source: ExampleSet, multiple: int) -> None:
        self._source = source
        self._length = -(-len(source) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        return self._source.sample(index if index < len(self._source) else BLANK)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def numbers_first(name: str) -> tuple[bool, int, str]:
    """2 before 10 before names."""
    number = re.fullmatch(r"-?[0-9]{1,18}", name) is not None
    return (not number, int(name) if number else 0, name)


def some_names(names: Sequence[str], limit: int = 6) -> str:
    """The first names of many, for messages."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
