"""GPT-2's tokenizer: byte-level byte pair encoding with a ``vocab.json`` and a ``merges.txt``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_lsh.data.preparation.text_lines import FileLines, utf8_lines
from megatron_lsh.data.tokenizers.special_tokens import SpecialTokens, digest
from megatron_lsh.errors import DataError

END = "<|endoftext|>"


class GPT2BPETokenizer(SpecialTokens):
    """Byte pairs merged in the order of a list, within words of GPT-2's pattern (Radford et al. 2019, section 2.2).

    As in Megatron-LM ids equal those of transformers' GPT2Tokenizer: <|endoftext|>, which also ends a document, is one
    token wherever it stands, and gets the next id if the vocabulary lacks it.

    Args:
        vocab_file: JSON object from tokens to ids.
        merge_file: one pair of tokens per line, those to merge first at the top.

    Raises:
        DataError: naming file and line, if one is missing, damaged, or does not fit the other.
    """

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str, vocab_extra_ids: int = 0) -> None:
        vocabulary = _read_vocabulary(Path(vocab_file))
        merges = _read_merges(Path(merge_file), vocabulary)
        self.backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens([END])
        self.eod = self.bos = self.eos = self.backend.get_vocab()[END]
        self.vocab_size = 1 + max(self.eod, *vocabulary.values())  # ids may have gaps
        self._find_sentinels(vocabulary.get, vocab_extra_ids)
        self._hash = hashlib.sha256(repr((sorted(vocabulary.items()), merges)).encode()).hexdigest()

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        special = {self.eod, *self.sentinels}
        return str(self.backend.decode([int(i) for i in ids if i not in special and i < self.vocab_size]))

    def fingerprint(self) -> str:
        return digest(self.name, self._hash)


def _read_vocabulary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise DataError(f"--vocab-file {path} does not exist: give GPT-2's vocab.json")
    try:
        vocabulary = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--vocab-file {path} is not JSON ({error}): give GPT-2's vocab.json") from error
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise DataError(f"--vocab-file {path} must map tokens to different ids: give GPT-2's vocab.json")
    return {str(token): number for token, number in vocabulary.items()}


def _read_merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"--merge-file {path} does not exist: give GPT-2's merges.txt")
    merges = []
    for number, line in enumerate(utf8_lines(FileLines(path), f"--merge-file {path}"), start=1):
        pair = line.rstrip("\r\n").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2:
            raise DataError(f"--merge-file {path}, line {number} must be two tokens: give GPT-2's merges.txt")
        missing = [token for token in (*pair, "".join(pair)) if token not in vocabulary]
        if missing:
            raise DataError(
                f"--merge-file {path}, line {number}: {missing[0]} is not in --vocab-file: give the two files of one model"
            )
        merges.append((pair[0], pair[1]))
    return merges
