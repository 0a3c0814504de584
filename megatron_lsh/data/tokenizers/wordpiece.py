"""BERT's tokenizer: words cut into the longest pieces that a vocabulary file lists."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_lsh.data.tokenizers.special_tokens import SpecialTokens, digest
from megatron_lsh.errors import ConfigError, DataError

UNKNOWN, CONTINUATION = "[UNK]", "##"
SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 256  # characters a trained vocabulary spells out; rarer ones become [UNK]


class BertWordPieceTokenizer(SpecialTokens):
    """WordPiece with the vocabulary of a ``vocab.txt``: one token per line, its number is its id.

    As in Megatron, [BOS] and [EOS] follow the vocabulary unless they are in it, then the sentinels; [EOS] also ends a
    document. White space is not kept.

    Args:
        vocab_file: the vocabulary.
        lower_case: lower the case and drop accents first (the files called "uncased").

    Raises:
        DataError: if the file is missing or no vocabulary of this kind.
    """

    def __init__(self, vocab_file: str, lower_case: bool, vocab_extra_ids: int = 0) -> None:
        self.name = "BertWordPieceLowerCase" if lower_case else "BertWordPieceCase"
        vocabulary, self._hash = _read(vocab_file)
        self._pieces = vocabulary
        self.backend = _backend(models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN), lower_case)
        self.vocab_size = 1 + max(vocabulary.values())
        self.cls, self.sep, self.mask, self.pad = map(vocabulary.get, ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
        self.bos, self.eos = self._own_or_next("[BOS]"), self._own_or_next("[EOS]")
        self.eod = self.eos
        self._find_sentinels(vocabulary.get, vocab_extra_ids)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name, as far as there are any."""
        ids = (self.pad, self.cls, self.sep, self.mask, self.bos, self.eos)
        names = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
        return {name: number for name, number in zip(names, ids, strict=True) if number is not None}

    def _own_or_next(self, token: str) -> int:
        if token in self._pieces:
            return self._pieces[token]
        self.vocab_size += 1
        return self.vocab_size - 1

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        special = {self.cls, self.sep, self.mask, self.pad, self.bos, self.eos, *self.sentinels}
        return str(self.backend.decode([int(i) for i in ids if i not in special and i < self.vocab_size]))

    def continues_word(self) -> npt.NDArray[np.bool_]:
        """Pieces that begin with ``##``."""
        inside = np.zeros(self.vocab_size, dtype=bool)
        inside[[number for piece, number in self._pieces.items() if piece.startswith(CONTINUATION)]] = True
        return inside

    def fingerprint(self) -> str:
        return digest(self.name, self._hash)


def _read(vocab_file: str) -> tuple[dict[str, int], str]:
    """Id of each token, and a hash of the file."""
    path = Path(vocab_file)
    if not path.is_file():
        raise DataError(f"--vocab-file {vocab_file} does not exist: give a WordPiece vocabulary, one token per line")
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"--vocab-file {vocab_file} cannot be read ({error}): check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--vocab-file {vocab_file} is not UTF-8 ({error}): give a WordPiece vocab.txt") from error
    if not lines[-1]:
        lines.pop()
    vocabulary = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    if UNKNOWN not in vocabulary:
        raise DataError(
            f"--vocab-file {vocab_file} has no line {UNKNOWN}: give a WordPiece vocab.txt, one token per line (for a "
            "tokenizer.json use --tokenizer-type HuggingFaceTokenizer)"
        )
    return vocabulary, hashlib.sha256(content).hexdigest()


def _backend(model: models.Model, lower_case: bool) -> Backend:
    """BERT's steps around the model. Without its special tokens, so that a text that says [SEP] is only text."""
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return backend


def train_wordpiece(texts: Iterable[str], vocab_size: int, lower_case: bool = False) -> str:
    """Content of a ``vocab.txt`` learned from texts; the special tokens come first, the same texts give the same file.

    It has fewer lines than ``vocab_size`` if that many pieces cannot be made from the texts.

    Raises:
        ConfigError: if the characters alone are more than ``vocab_size``.
    """
    backend = _backend(models.WordPiece(unk_token=UNKNOWN), lower_case)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        characters.update({character: count * word.count(character) for character in set(word)})
    alphabet = set(sorted(characters, key=lambda character: (-characters[character], character))[:ALPHABET])
    # By default the trainer numbers the characters in the order of a hash table, which differs between processes.
    first = sorted({word[0] for word in words} & alphabet)
    inside = sorted({character for word in words for character in word[1:]} & alphabet)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *first, *(CONTINUATION + character for character in inside)],
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    # One word after the other: every text is only read once, and its words are already counted.
    backend.train_from_iterator((" ".join([word] * count) for word, count in sorted(words.items())), trainer)
    vocabulary = backend.get_vocab()
    if len(vocabulary) > vocab_size:
        raise ConfigError(
            f"--vocab-size ({vocab_size}) does not suit the text, whose characters alone are {len(vocabulary)} WordPieces: "
            "choose a larger one"
        )
    return "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
