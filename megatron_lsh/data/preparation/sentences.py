"""Text to sentences, for models whose samples are made of whole sentences (BERT, T5).

Sentences of a natural language are found by the rules of the package ``sentencex`` (abbreviations, quotes and numbers of
many languages, nothing to download). Text that has no sentences, such as program code, is cut into lines or paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from megatron_lsh.errors import ConfigError

UNITS = ("sentence", "line", "paragraph")
# Names that Megatron-LM's --lang takes (NLTK's), as the codes that sentencex takes.
LANGUAGES = {
    "czech": "cs",
    "danish": "da",
    "dutch": "nl",
    "english": "en",
    "estonian": "et",
    "finnish": "fi",
    "french": "fr",
    "german": "de",
    "greek": "el",
    "italian": "it",
    "malayalam": "ml",
    "norwegian": "no",
    "polish": "pl",
    "portuguese": "pt",
    "russian": "ru",
    "slovene": "sl",
    "spanish": "es",
    "swedish": "sv",
    "turkish": "tr",
}


class SentenceSplitter:
    """Cuts texts into sentences.

    Args:
        unit: ``sentence``, ``line``, or ``paragraph`` (ends at a blank line).
        language: of the text, for ``sentence``: a name of LANGUAGES or an ISO 639 code.
        keep_white_space: white space after a sentence stays with it, so that the sentences put together are the text.
            Otherwise it is dropped on both sides; inside a sentence it is kept.

    Raises:
        ConfigError: if the language cannot be one, or the package is missing.
    """

    def __init__(self, unit: str = "sentence", language: str = "english", keep_white_space: bool = False) -> None:
        self._keep = keep_white_space
        self._pieces: Callable[[str], Iterator[str]]
        if unit == "sentence":
            self._pieces = _segmenter(language)
        else:
            pattern = re.compile(r"\n" if unit == "line" else r"\n(?=\s*?\n)")
            self._pieces = lambda text: iter(pattern.split(text))

    def split(self, text: str) -> list[str]:
        """Sentences of a text in their order; none of them is only white space."""
        starts: list[int] = []
        at = 0
        for piece in self._pieces(text):
            core = piece.strip()
            # sentencex drops line breaks now and then, so its pieces say where a sentence begins, not what it is.
            found = text.find(core, at) if core else -1
            if found >= 0:
                starts.append(found)
                at = found + len(core)
        if not starts:
            return []
        ends = [*starts[1:], len(text)]
        starts[0] = 0
        parts = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        if self._keep:
            return _indentation_to_next(parts)
        return [part.strip() for part in parts]


def _indentation_to_next(parts: list[str]) -> list[str]:
    """Moves white space after the last line break of a sentence to the next one, whose indentation it is."""
    moved, carry = [], ""
    for number, part in enumerate(parts):
        whole, carry = carry + part, ""
        body = whole.rstrip()
        space = whole[len(body) :]
        if number + 1 < len(parts) and "\n" in space:
            cut = len(body) + space.rindex("\n") + 1
            whole, carry = whole[:cut], whole[cut:]
        moved.append(whole)
    return moved


def _segmenter(language: str) -> Callable[[str], Iterator[str]]:
    code = LANGUAGES.get(language.lower(), language.lower())
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z0-9]+)*", code):
        raise ConfigError(
            f"--lang ({language}) must be an ISO 639 code such as en, or one of {', '.join(LANGUAGES)}: change it"
        )
    try:
        from sentencex import segment
    except ImportError as error:
        raise ConfigError(
            "--split-sentences needs the package sentencex, which is not installed: pip install sentencex, or cut at line "
            "breaks with --sentence-unit line"
        ) from error
    return lambda text: iter(segment(code, text))
