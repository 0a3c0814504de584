"""Lines of text files, plain or compressed, with their numbers in every error."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron_lsh.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class FileLines:
    """Lines of a file, as bytes with their ends; a ``.gz`` file is decompressed.

    Attributes:
        position: bytes of the file that are read so far.

    Raises:
        DataError: from the iterator, naming the file and the last line that was read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def __iter__(self) -> Iterator[bytes]:
        packed, number = self.path.suffix.lower() == ".gz", 0
        self.position = 0
        try:
            with open(self.path, "rb") as raw, gzip.open(raw) if packed else nullcontext(raw) as stream:
                for number, line in enumerate(stream, start=1):  # noqa: B007  (for the message)
                    self.position = raw.tell() if packed else self.position + len(line)
                    yield line
        except (OSError, EOFError, zlib.error) as error:
            after = f" after line {number}" if number else ""
            raise DataError(f"{self.path} is damaged or cannot be read{after} ({error}): copy it again") from error


def utf8_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Text of the lines of a file, without a byte order mark at its beginning. A lone carriage return ends a line, too.

    Raises:
        DataError: naming `name` and the line that is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        try:
            text = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{name}, line {number} is not UTF-8 ({error}): convert it, e.g. with iconv") from error
        if "\r" in text:
            yield from io.StringIO(text, newline="")
        elif text:
            yield text


def parse_json_line(line: bytes | str, where: str) -> dict[str, Any]:
    """The object on a line; `where` names the line in the DataError for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): put one JSON object on each line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is a JSON {type(record).__name__}: put one JSON object on each line")
    return record


def encodable(text: str) -> str:
    """The text with a question mark for half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="replace").decode()
    return text
