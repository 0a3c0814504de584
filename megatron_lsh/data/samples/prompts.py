"""Texts for a model to continue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import ConfigError


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The texts of ``--prompt``, then those of ``--prompt-file``, of which every line is one.

    Raises:
        ConfigError: if there is none, the file cannot be read, or a text is not UTF-8.
    """
    texts = list(given)
    for number, text in enumerate(texts, start=1):
        if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
            raise ConfigError(f"--prompt: text {number} ({text!a:.60}) must be UTF-8: check the terminal's encoding")
    if file is not None:
        texts += _lines(file)
    if not texts:
        raise ConfigError("--prompt (absent) must be given: give the texts to continue, or --prompt-file")
    return texts


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--prompt-file ({file}) must be a readable file ({error.strerror}): give another") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # not splitlines, which also ends lines at form feeds
    if not lines[-1]:
        lines.pop()
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt-file ({file}), line {number} must be UTF-8 ({error}): convert it") from error
    return texts


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to be continued; an end-of-document token for no text.

    What the tokenizer itself puts before a text (<s>, [CLS]) stays. What it puts behind (</s>, [SEP]) goes: a text that has
    ended is not continued. An end token that the text itself spells out stays.
    """
    ids, bare = tokenizer.tokenize(text), tokenizer.tokenize(text, add_special_tokens=False)
    ends = {tokenizer.eod, tokenizer.eos, tokenizer.sep}
    while ids and ids[-1] in ends and (not bare or ids[-len(bare) :] != bare):
        ids.pop()
    return ids or [tokenizer.eod]
