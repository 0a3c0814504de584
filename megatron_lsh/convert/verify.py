"""Is what was written what was read? Checksums of every tensor, read back from the disk."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.convert.progress import ByteProgress
from megatron_lsh.convert.source import VOCABULARY, Rows, Source, all_pieces, bytes_of, fail, required_vocab
from megatron_lsh.errors import CheckpointError

_BLOCK = 2**24  # elements looked at in one go


class Recorder:
    """Reads pieces of a source, in order, refuses what is not finite, and keeps a checksum (SHA-256) per tensor.

    Padding of the vocabulary, which depends on the layout, does not count, but must be zero.
    """

    def __init__(self, source: Source, progress: ByteProgress | None = None) -> None:
        self._source = source
        self._progress = progress
        self._hashes: dict[str, Any] = {}

    def read(self, rows: Rows) -> Tensor:
        """The piece. Raises CheckpointError naming the tensor if a value is NaN or infinite."""
        value = self._source.read(rows).contiguous()
        if not _is_finite(value):
            names = " or ".join(self._source.culprits(rows))
            raise CheckpointError(
                f"{self._source.what}: {names} holds NaN or infinity: take an earlier checkpoint, or a wider --dtype"
            )
        if rows.name in VOCABULARY and rows.first >= required_vocab(self._source.cfg):
            if value.any():
                raise CheckpointError(f"{self._source.what}: padding in {rows.name} is not zero: report this as a bug")
        else:
            spec = self._source.tensors[rows.name]
            digest = self._hashes.setdefault(rows.name, hashlib.sha256(_header(rows.name, spec.shape, spec.dtype)))
            digest.update(bytes_of(value))
        if self._progress is not None:
            self._progress.add(value.nbytes)
        return value

    @property
    def digests(self) -> dict[str, str]:
        """Tensor -> checksum of name, shape, type and content."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def _header(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    return f"{name} {list(shape[1:] if name in VOCABULARY else shape)} {dtype}".encode()


def _is_finite(value: Tensor) -> bool:
    flat = value.view(-1)
    # A sum is finite only if every term is; where it overflows, look again.
    return all(
        bool(torch.isfinite(block.sum(dtype=torch.float32))) or bool(torch.isfinite(block).all())
        for block in flat.split(_BLOCK)
    )


def verify_copy(digests: dict[str, str], copy: Source, progress: ByteProgress | None = None) -> int:
    """Read `copy` whole and compare. Returns the number of tensors. Raises CheckpointError naming what differs."""
    recorder = Recorder(copy, progress)
    for rows in all_pieces(copy):
        recorder.read(rows)
    written = recorder.digests
    problems = [f"{name} was not written" for name in digests if name not in written]
    problems += [f"{name} was written but never read" for name in written if name not in digests]
    problems += [f"{name} differs from what was read" for name in digests if written.get(name, "") != digests[name]]
    fail(copy.what, list(dict.fromkeys(problems)), "the disk or the converter is at fault; convert again")
    return len(written)
