"""Reading and writing safetensors files one tensor (or some of its rows) at a time.

Reading is the business of the library, which checks headers thoroughly. Its writer takes a whole file's tensors at once, so
writing one tensor after the other is done here. A file is: uint64 little-endian length of the header | JSON header,
{name: {dtype, shape, data_offsets: [begin, end]}} with offsets counted from the header's end | the tensors, row-major,
little-endian, without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lsh.convert.source import TensorSpec, bytes_of
from megatron_lsh.errors import CheckpointError, first_line

# Types of weights: others (integers, eight bits) are parts of quantized models.
FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
)
_NAMES = MappingProxyType({dtype: name for name, dtype in FLOATS.items()})
_AGAIN = "download or copy the file again"


class SafetensorsReader:
    """All tensors of some safetensors files. Making it reads and checks the headers only.

    Attributes:
        tensors: shape and type of those that can be weights.
        others: name -> type of the rest, which `read` does not take.

    Raises CheckpointError: naming the file (and the tensor), for a truncated or damaged file, or a tensor that is in two.
    """

    def __init__(self, files: list[Path]) -> None:
        self.tensors: dict[str, TensorSpec] = {}
        self.others: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            with _opened(file) as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    if name in self._files:
                        raise CheckpointError(f"{name} is in {self._files[name]} and in {file}: remove one of them")
                    self._files[name] = file
                    stored = content.get_slice(name)
                    kind, shape = stored.get_dtype(), tuple(stored.get_shape())
                    if kind in FLOATS:
                        self.tensors[name] = TensorSpec(shape, FLOATS[kind])
                    else:
                        self.others[name] = kind

    def file_of(self, name: str) -> Path:
        return self._files[name]

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """The tensor, or `count` of its rows. Raises CheckpointError if the file cannot be read."""
        # Opened each time: a mapping that lives on would keep all that was read in this process's memory.
        with _opened(self._files[name]) as content:
            if count is None:
                return content.get_tensor(name)  # type: ignore[no-any-return]
            return content.get_slice(name)[first : first + count]  # type: ignore[no-any-return]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({first_line(error)}): {_AGAIN}") from None


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
        self._number, self._name = 0, ""
        self._missing = 0  # bytes of the tensor that is being written
        self._stream: BinaryIO | None = None
        self._current = -1

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, or its first rows, or the rows that follow.

        Raises OSError; ValueError if it is not the next one, or not as announced.
        """
        if not self._missing:
            self._number, self._name = next(self._expected, (-1, ""))
        spec = self._shards[self._number].get(self._name)
        if spec is not None and not self._missing:
            self._missing = spec.nbytes
        fits = spec is not None and tensor.shape[1:] == spec.shape[1:] and tensor.dtype == spec.dtype
        if name != self._name or not fits or tensor.nbytes > self._missing:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} was not announced next, but {self._name} {spec}"
            )
        if self._number != self._current:
            self._open(self._number)
        assert self._stream is not None
        self._stream.write(bytes_of(tensor.contiguous()))
        self._missing -= tensor.nbytes

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
        left = (self._number, self._name) if self._missing else next(self._expected, None)
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
