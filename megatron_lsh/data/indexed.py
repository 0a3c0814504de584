"""Megatron's indexed dataset: ``PREFIX.bin`` (token ids back to back) and ``PREFIX.idx`` (where each sequence lies).

Layout of the index, all little-endian (format version 1, the only one in use)::

    9 bytes    magic  b"MMIDIDX\\0\\0"
    uint64     version = 1
    uint8      code of the token type, see TOKEN_DTYPES
    uint64     N, number of sequences
    uint64     D, number of documents + 1
    int32[N]   tokens per sequence
    int64[N]   byte offset of each sequence in the .bin file
    int64[D]   first sequence of each document, from 0 to N
    int8[N]    mode of each sequence, in multimodal files only

A document is one or more consecutive sequences (one, unless the text was split into sentences).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lsh.data.mapped import MappedFile
from megatron_lsh.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, N, D
TOKEN_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CHECK_BLOCK = 1 << 20  # sequences per step of the checks on opening, so that huge indices need little memory
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 64, 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """Type Megatron stores ids of this vocabulary in: uint16 under 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """The file with the tokens of a dataset."""
    return Path(os.fspath(prefix) + ".bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """The file with the index of a dataset."""
    return Path(os.fspath(prefix) + ".idx")


class IndexedDataset:
    """Read-only view of one dataset; nothing but the header is read until it is used.

    Args:
        prefix: path of the two files without their suffix.

    Attributes:
        dtype: type of the stored token ids.
        tokens: all tokens of the file, in file order (memory map).
        lengths: int32 [sequences] tokens per sequence.
        document_index: int64 [documents + 1] first sequence of each document.
        modes: int8 [sequences] of a multimodal file, else None.

    Raises:
        DataError: if a file is missing, damaged, or does not fit the other one.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(_missing_message(self.prefix, path))
        path = idx_path(prefix)
        self._files = (MappedFile(path), MappedFile(bin_path(prefix)))
        size = self._files[0].size
        if size < HEADER.size:
            raise DataError(
                f"{path} has {size} bytes; an index starts with a header of {HEADER.size}. "
                "It was cut off: write the dataset again with tools/preprocess_data.py"
            )
        with open(path, "rb") as stream:
            magic, version, code, sequences, entries = HEADER.unpack(stream.read(HEADER.size))
        if magic != MAGIC:
            raise DataError(f"{path} starts with {magic!r}, an index with {MAGIC!r}: this is not a Megatron .idx file")
        if version != VERSION:
            raise DataError(f"{path} has version {version}; only version {VERSION} can be read: write it again")
        if code not in TOKEN_DTYPES or TOKEN_DTYPES[code].kind == "f":
            known = {key: dtype.name for key, dtype in TOKEN_DTYPES.items() if dtype.kind != "f"}
            raise DataError(f"{path} has token type code {code}, which must be one of {known}: write it again")
        self.dtype = TOKEN_DTYPES[code]
        text_size = HEADER.size + 12 * sequences + 8 * entries
        if entries < 1 or size not in (text_size, text_size + sequences):
            raise DataError(
                f"{path} has {size} bytes, but its header ({sequences} sequences, {entries} document boundaries) calls "
                f"for {text_size} (or {text_size + sequences} if multimodal): it is cut off or damaged; write it again"
            )
        index = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # plain arrays slice faster than memmap objects
        at = HEADER.size
        self.lengths: npt.NDArray[np.int32] = index[at : at + 4 * sequences].view("<i4")
        at += 4 * sequences
        self.offsets: npt.NDArray[np.int64] = index[at : at + 8 * sequences].view("<i8")
        at += 8 * sequences
        self.document_index: npt.NDArray[np.int64] = index[at : at + 8 * entries].view("<i8")
        at += 8 * entries
        self.modes: npt.NDArray[np.int8] | None = index[at:].view("i1") if size > at else None
        self.num_tokens = self._check()
        empty = self.num_tokens == 0  # an empty file cannot be mapped
        self.tokens: np.ndarray = (
            np.empty(0, self.dtype) if empty else np.asarray(np.memmap(bin_path(prefix), dtype=self.dtype, mode="r"))
        )

    def check_files(self) -> None:
        """To be called before tokens or the index are read. Raises DataError if a file is shorter than it was."""
        for file in self._files:
            file.check()

    def _check(self) -> int:
        """Do the arrays of the index agree with each other and with the .bin file? Returns the number of tokens."""
        path, documents = idx_path(self.prefix), self.document_index
        if documents[0] != 0 or documents[-1] != len(self.lengths) or not _ascending(documents):
            raise DataError(
                f"{path} has a document index from {documents[0]} to {documents[-1]}; it must rise from 0 to the "
                f"number of sequences, {len(self.lengths)}: the file is damaged, write it again"
            )
        tokens = 0
        for start in range(0, len(self.lengths), CHECK_BLOCK):
            lengths = self.lengths[start : start + CHECK_BLOCK].astype(np.int64)
            ends = tokens + np.cumsum(lengths)
            wrong = np.flatnonzero(
                (lengths < 0) | (self.offsets[start : start + CHECK_BLOCK] != (ends - lengths) * self.dtype.itemsize)
            )
            if len(wrong):
                at = start + int(wrong[0])
                raise DataError(
                    f"{path}: sequence {at} has length {self.lengths[at]} and byte offset {self.offsets[at]}; sequences "
                    "must lie back to back: the file is damaged, write it again"
                )
            tokens = int(ends[-1])
        size, expected = self._files[1].size, tokens * self.dtype.itemsize
        if size != expected:
            reason = "is cut off" if size < expected else "belongs to another index"
            raise DataError(
                f"{bin_path(self.prefix)} has {size} bytes, but its index describes {expected} ({tokens} tokens of "
                f"{self.dtype.itemsize} bytes): the file {reason}; copy or write both again"
            )
        return tokens

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Tokens of one sequence, as stored."""
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        start = int(self.offsets[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[sequence])]

    def document_start(self, document: int) -> int:
        """Position in ``tokens`` at which a document begins (for ``num_documents``: where the last one ends)."""
        sequence = int(self.document_index[document])
        return self.num_tokens if sequence == len(self.lengths) else int(self.offsets[sequence]) // self.dtype.itemsize

    def document_bounds(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Token positions at which documents ``start`` .. ``stop - 1`` begin, and where the last one ends."""
        sequence = self.document_index[start : stop + 1]
        bounds = np.full(len(sequence), self.num_tokens, dtype=np.int64)
        inside = sequence < len(self.lengths)
        bounds[inside] = self.offsets[sequence[inside]] // self.dtype.itemsize
        return bounds

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: both sizes and up to 64 evenly spaced blocks of each file (so its cost is constant).

        The path and the modification time do not matter: a copy on another machine has the same fingerprint.
        """
        digest = hashlib.sha256()
        for path in (idx_path(self.prefix), bin_path(self.prefix)):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            last = max(size - FINGERPRINT_BLOCK_BYTES, 0)
            with open(path, "rb") as stream:
                for offset in sorted({last * i // (FINGERPRINT_BLOCKS - 1) for i in range(FINGERPRINT_BLOCKS)}):
                    stream.seek(offset)
                    digest.update(stream.read(FINGERPRINT_BLOCK_BYTES))
        return digest.hexdigest()


def _ascending(values: np.ndarray) -> bool:
    return all(
        bool((np.diff(values[start : start + CHECK_BLOCK + 1]) >= 0).all())
        for start in range(0, len(values), CHECK_BLOCK)
    )


def _missing_message(prefix: str, path: Path) -> str:
    """Says what is not there and, if it is near, what the user probably meant."""
    message = f"{path} does not exist. --data-path takes the common prefix of a .bin and an .idx file"
    if prefix.endswith((".bin", ".idx")):
        return f"{message}: leave out the suffix {prefix[-4:]}"
    near = sorted(str(found)[:-4] for found in path.parent.glob(f"{Path(prefix).name}*.idx"))
    if near:
        return f"{message}; did you mean {' or '.join(near[:3])}?"
    return f"{message}; tools/preprocess_data.py writes them"


class IndexedDatasetWriter:
    """Writes a dataset. Used as a context manager; the two files appear under their names only if the block ends well.

    Tokens go to ``PREFIX.bin.PID.tmp``. At the end both files are flushed to disk and renamed, the index last, and an
    exception removes them, so that an interrupted run leaves nothing that looks finished.

    Args:
        prefix: path of the two files without their suffix. Missing folders are made, existing files replaced.
        dtype: type to store token ids in, see `token_dtype`.
        multimodal: also store a mode per sequence.

    Raises:
        DataError: from any method, if the files cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, multimodal: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in TOKEN_DTYPES.items() if known == self.dtype]
        if not codes or self.dtype.kind == "f":
            raise DataError(f"{self.prefix}: tokens cannot be stored as {self.dtype}: use an integer type")
        self._code = codes[0]
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._modes = array("b") if multimodal else None
        self.num_tokens = 0
        self.max_token = -1
        self._temporary_bin = Path(f"{self.prefix}.bin.{os.getpid()}.tmp")
        self._temporary_idx = Path(f"{self.prefix}.idx.{os.getpid()}.tmp")
        try:
            self._temporary_bin.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._temporary_bin, "wb")  # noqa: SIM115  (closed by finish or abort)
        except OSError as error:
            raise DataError(
                f"{self._temporary_bin} cannot be written ({error}): choose another output folder"
            ) from error

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.abort()

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    def add_document(
        self,
        tokens: npt.ArrayLike,
        lengths: Sequence[int] | None = None,
        modes: Sequence[int] | None = None,
    ) -> None:
        """Append one document.

        Args:
            tokens: ids [tokens of the document].
            lengths: tokens of each of its sequences (default: all in one).
            modes: mode of each of its sequences, for a multimodal dataset (default: 0).
        """
        array_ = np.asarray(tokens)
        lengths = [array_.size] if lengths is None else list(lengths)
        self.add_documents(array_, lengths, [len(lengths)], modes)

    def add_documents(
        self,
        tokens: np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        sequences: Sequence[int] | np.ndarray,
        modes: Sequence[int] | None = None,
    ) -> None:
        """Append several documents at once.

        Args:
            tokens: ids of all documents [total tokens].
            lengths: tokens per sequence [total sequences], adding up to the size of ``tokens``.
            sequences: sequences per document [documents], adding up to the size of ``lengths``.
            modes: mode per sequence [total sequences] for a multimodal dataset.
        """
        lengths_, sequences_ = np.asarray(lengths, dtype=np.int64), np.asarray(sequences, dtype=np.int64)
        if int(lengths_.sum()) != tokens.size or int(sequences_.sum()) != lengths_.size:
            raise ValueError("lengths must add up to the number of tokens, sequences to the number of lengths")
        if lengths_.size and int(lengths_.max()) > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a sequence has {lengths_.max()} tokens; the format allows 2^31 - 1: split it"
            )
        if modes is not None and (self._modes is None or len(modes) != lengths_.size):
            raise ValueError("modes need multimodal=True and one value per sequence")
        self._check_range(tokens)
        try:
            self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        except OSError as error:
            raise DataError(_write_message(self._temporary_bin, error)) from error
        self._append(
            lengths_, sequences_, np.zeros(lengths_.size, np.int8) if modes is None else np.asarray(modes, np.int8)
        )
        self.num_tokens += tokens.size

    def _check_range(self, tokens: np.ndarray) -> None:
        if not tokens.size:
            return
        low, high, limits = int(tokens.min()), int(tokens.max()), np.iinfo(self.dtype)
        if low < limits.min or high > limits.max:
            raise DataError(
                f"{self.prefix}: token id {low if low < limits.min else high} does not fit {self.dtype}: "
                "write the dataset with the type that suits the vocabulary"
            )
        self.max_token = max(self.max_token, high)

    def _append(self, lengths: np.ndarray, sequences: np.ndarray, modes: np.ndarray) -> None:
        ends = len(self._lengths) + np.cumsum(sequences)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.frombytes(ends.astype(np.int64).tobytes())
        if self._modes is not None:
            self._modes.frombytes(modes.tobytes())

    def add_dataset(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of a finished dataset of the same token type."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype or (other.modes is None) != (self._modes is None):
            raise DataError(
                f"{other.prefix} stores {other.dtype}{', multimodal' if other.modes is not None else ''} and cannot be "
                f"merged into {self.prefix}, which stores {self.dtype}: all datasets of a merge must have the same type"
            )
        try:
            with open(bin_path(prefix), "rb") as stream:
                shutil.copyfileobj(stream, self._bin, 1 << 24)
        except OSError as error:
            raise DataError(_write_message(self._temporary_bin, error)) from error
        modes = np.zeros(0, np.int8) if other.modes is None else np.asarray(other.modes)
        self._append(np.asarray(other.lengths), np.diff(other.document_index), modes)
        self.num_tokens += other.num_tokens

    def finish(self) -> None:
        """Write the index, flush both files to disk and give them their names."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        try:
            _flush(self._bin)
            self._bin.close()
            with open(self._temporary_idx, "wb") as stream:
                stream.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._documents)))
                stream.write(lengths.astype("<i4").data)
                stream.write(offsets.astype("<i8").data)
                stream.write(np.frombuffer(self._documents, dtype=np.int64).astype("<i8").data)
                if self._modes:
                    stream.write(np.frombuffer(self._modes, dtype=np.int8).data)
                _flush(stream)
            # An older index must not describe the new tokens, should the machine stop between the two renames.
            idx_path(self.prefix).unlink(missing_ok=True)
            os.replace(self._temporary_bin, bin_path(self.prefix))
            os.replace(self._temporary_idx, idx_path(self.prefix))
        except OSError as error:
            self.abort()
            raise DataError(_write_message(bin_path(self.prefix), error)) from error

    def abort(self) -> None:
        """Remove what was written so far."""
        with suppress(OSError):  # a full disk fails again when the buffer is flushed; the file goes anyway
            self._bin.close()
        self._temporary_bin.unlink(missing_ok=True)
        self._temporary_idx.unlink(missing_ok=True)


def merge(prefixes: Sequence[str | os.PathLike[str]], output_prefix: str | os.PathLike[str]) -> None:
    """Concatenate datasets of the same token type, in the given order, into a new one.

    Raises:
        DataError: if there is nothing to merge, a dataset is damaged, or the token types differ.
    """
    if not prefixes:
        raise DataError(f"{os.fspath(output_prefix)}: no datasets to merge; give at least one prefix")
    first = IndexedDataset(prefixes[0])
    with IndexedDatasetWriter(output_prefix, first.dtype, multimodal=first.modes is not None) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _write_message(path: Path, error: OSError) -> str:
    free = shutil.disk_usage(path.parent).free
    return (
        f"{path} cannot be written: {error} ({free / 1e6:.0f} MB free there). Free some space or choose another folder"
    )
