"""Reading and writing safetensors files one tensor (or some of its rows) at a time, without mapping files into memory.

A file is: uint64 little-endian length of the header | JSON header, {name: {dtype, shape, data_offsets: [begin, end]}} with
offsets counted from the header's end | the tensors, row-major, little-endian, without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_lsh.convert.source import TensorSpec
from megatron_lsh.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
)
_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class _Entry:
    file: Path
    begin: int  # byte in the file
    spec: TensorSpec


class SafetensorsReader:
    """All tensors of some safetensors files. Making it reads and checks the headers only.

    Raises CheckpointError: naming the file and the tensor, for a truncated or damaged file, an unsupported type, or a
    tensor that is in two files.
    """

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    raise CheckpointError(f"{name} is in {self._entries[name].file} and in {file}: remove one of them")
                self._entries[name] = entry

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {name: entry.spec for name, entry in self._entries.items()}

    def file_of(self, name: str) -> Path:
        return self._entries[name].file

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """The tensor, or `count` of its rows. Raises CheckpointError if the file cannot be read."""
        entry = self._entries[name]
        shape = list(entry.spec.shape)
        row = math.prod(shape[1:]) * entry.spec.dtype.itemsize
        if count is not None:
            shape[0] = count
        tensor = torch.empty(shape, dtype=entry.spec.dtype)
        try:
            with open(entry.file, "rb", buffering=0) as stream:
                stream.seek(entry.begin + first * row)
                _read_into(stream, tensor)
        except OSError as error:
            raise CheckpointError(f"{entry.file} cannot be read: {error.strerror or error}: {_AGAIN}") from None
        return tensor


def _read_into(stream: Any, tensor: Tensor) -> None:
    view = bytes_of(tensor)
    while view:
        got = stream.readinto(view[: 1 << 30])
        if not got:
            raise OSError("the file ended early")
        view = view[got:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_header(file: Path) -> dict[str, _Entry]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{file} is truncated or not a safetensors file: {_AGAIN}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}: {_AGAIN}") from None
    except ValueError:
        raise CheckpointError(f"{file} has a damaged header: {_AGAIN}") from None
    entries: dict[str, _Entry] = {}
    end = 8 + length
    for name, value in header.items():
        if name == "__metadata__":
            continue
        entries[name] = entry = _entry(file, name, value, 8 + length)
        if entry.begin + entry.spec.nbytes > size:
            raise CheckpointError(
                f"{file} is truncated: {name} ends at byte {entry.begin + entry.spec.nbytes} of {size}: {_AGAIN}"
            )
        end = max(end, entry.begin + entry.spec.nbytes)
    if end != size:
        raise CheckpointError(f"{file} has {size - end} bytes behind its last tensor: {_AGAIN}")
    return entries


def _entry(file: Path, name: str, value: Any, data: int) -> _Entry:
    try:
        kind, shape = value["dtype"], tuple(int(size) for size in value["shape"])
        begin, end = value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} has a damaged header (at {name}): {_AGAIN}") from None
    if kind not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} is of type {kind}, which must be one of {', '.join(DTYPES)}: quantized models are not supported"
        )
    entry = _Entry(file, data + begin, TensorSpec(shape, DTYPES[kind]))
    if begin < 0 or end - begin != entry.spec.nbytes:
        raise CheckpointError(f"{file} has a damaged header ({name} has {end - begin} bytes of data): {_AGAIN}")
    return entry


class SafetensorsWriter:
    """Writes tensors into a folder of ``model-00001-of-0000N.safetensors`` files and an index.

    The files are laid out from the specs alone, so tensors can be written as they come, in the order of `tensors`. A context
    manager, which closes the file that is open when something goes wrong.

    Args:
        max_shard: bytes a file holds at most, unless a single tensor is larger.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorSpec], max_shard: int) -> None:
        if sys.byteorder != "little":
            raise CheckpointError("safetensors files are little-endian, and this machine is not: convert elsewhere")
        shards: list[dict[str, TensorSpec]] = [{}]
        size = 0
        for name, spec in tensors.items():
            if shards[-1] and size + spec.nbytes > max_shard:
                shards.append({})
                size = 0
            shards[-1][name] = spec
            size += spec.nbytes
        self._folder = folder
        self._shards = shards
        self._names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]  # fmt: skip
        self._expected = iter([(number, name) for number, shard in enumerate(shards) for name in shard])
        self._stream: BinaryIO | None = None
        self._current = -1

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises OSError; ValueError if it is not the next one, or not as announced."""
        number, expected = next(self._expected, (-1, None))
        spec = self._shards[number].get(name)
        if name != expected or spec != TensorSpec(tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} was not announced next, but {expected} {spec}"
            )
        if number != self._current:
            self._open(number)
        assert self._stream is not None
        self._stream.write(bytes_of(tensor.contiguous()))

    def _open(self, number: int) -> None:
        self._close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in self._shards[number].items():
            end = offset + spec.nbytes
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._current = number
        self._stream = open(self._folder / self._names[number], "xb")  # noqa: SIM115
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def finish(self) -> None:
        """Close the last file and write the index. Raises ValueError if tensors are missing, OSError."""
        left = next(self._expected, None)
        if left is not None:
            raise ValueError(f"{left[1]} was announced but not written")
        self._close()
        if len(self._shards) == 1:
            return
        total = sum(spec.nbytes for shard in self._shards for spec in shard.values())
        weight_map = {name: file for file, shard in zip(self._names, self._shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:  # not finished: whoever made the folder removes it
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None
