"""torch.distributed.checkpoint's (DCP's) ``.metadata``, read without executing any of it.

The file is a pickle, and an unpickler runs whatever a pickle names. This one knows the names that torch 2.11 to 2.13 write
(recorded by tracing both) and makes inert records of them. Those are checked field by field, and only then do torch's own
classes come into being, under the present names of the parameters (`megatron_lsh.checkpoint.renames`).
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_lsh.checkpoint.manifest import MANIFEST, Manifest, is_plain_name
from megatron_lsh.checkpoint.renames import RENAMED, Renamed, present_name
from megatron_lsh.checkpoint.saved import CONFIG, STATE
from megatron_lsh.checkpoint.tensors import MODEL, OPTIMIZER
from megatron_lsh.errors import DamagedCheckpoint

METADATA = ".metadata"


class _Record:
    """Stands in for a class of torch: keeps what the pickle gives it, and does nothing with it."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Properties(_Record):
    pass


class _Chunk(_Record):
    pass


class _Size(_Record):
    pass


class _Index(_Record):
    pass


class _Place(_Record):
    pass


class _Ignored(_Record):
    """Written by DCP and of no use here: paths and identifiers of the save, deprecated properties of tensors."""


_DTYPES = {
    ("torch", str(value).removeprefix("torch.")): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_KNOWN = MappingProxyType(
    {
        ("torch.distributed.checkpoint.metadata", "Metadata"): _Metadata,
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Tensor,
        ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Properties,
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): _Chunk,
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Index,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
        ("torch", "Size"): _Size,
        ("torch.distributed.checkpoint.metadata", "StorageMeta"): _Ignored,
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _Ignored,
        ("torch.serialization", "_get_layout"): _Ignored,
        ("pathlib", "PosixPath"): _Ignored,
        ("pathlib._local", "PosixPath"): _Ignored,  # Python 3.13
        **_DTYPES,
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs") from None


@dataclass(frozen=True)
class Place:
    """Where the bytes of a chunk are. The fields are those that DCP's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple[str, ...] = ()


def read_metadata(folder: Path, renamed: Renamed = RENAMED) -> Metadata:
    """Tensors of a checkpoint, and where their chunks are: ``storage_data`` maps indices to `Place`.

    Raises DamagedCheckpoint: no such file, a pickle that asks for anything but the names above, or a content that is not
    that of a complete checkpoint: a chunk outside its tensor, without a place, or in a file outside `folder`.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as stream:
            return _checked(_Unpickler(stream).load(), renamed)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror or error}") from None
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from None
    except Exception as error:  # an unpickler raises many kinds for bytes that are no pickle
        raise DamagedCheckpoint(f"{path} cannot be unpickled: {type(error).__name__}: {error}") from None


def _checked(top: Any, renamed: Renamed) -> Metadata:
    fields = _state(top, _Metadata, "the top")
    tensors: dict[str, TensorStorageMetadata] = {}
    for key, entry in _items(fields.get("state_dict_metadata"), "state_dict_metadata"):
        name = _present_key(key, renamed)
        if name in tensors:
            raise DamagedCheckpoint(f"two tensors are called {name}")
        tensors[name] = _tensor(entry, key)
    places: dict[MetadataIndex, Place] = {}
    for index, entry in _items(fields.get("storage_data"), "storage_data"):
        at = _state(index, _Index, "an index of storage_data")
        offset = _size(at.get("offset"), "an offset in storage_data")
        places[MetadataIndex(_present_key(at.get("fqn"), renamed), offset)] = _place(entry)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in places:
                raise DamagedCheckpoint(f"it does not say where the part of {name} at {tuple(chunk.offsets)} is")
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())  # type: ignore[arg-type]


def _state(record: Any, kind: type[_Record], what: str) -> dict[str, Any]:
    if not isinstance(record, kind) or not isinstance(record.state, dict):
        raise DamagedCheckpoint(f"{what} is not what torch.distributed.checkpoint writes there")
    return record.state


def _items(value: Any, what: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{what} is not a table")
    return list(value.items())


def _present_key(key: Any, renamed: Renamed) -> str:
    """A key such as ``model.NAME`` or ``optimizer.state.NAME.exp_avg`` with the present name of the parameter."""
    if not isinstance(key, str):
        raise DamagedCheckpoint("the name of a tensor is not a text")
    if key.startswith(MODEL):
        return MODEL + present_name(key[len(MODEL) :], renamed)
    if key.startswith(OPTIMIZER):
        name, _, entry = key[len(OPTIMIZER) :].rpartition(".")
        return f"{OPTIMIZER}{present_name(name, renamed)}.{entry}"
    return key


def _tensor(entry: Any, key: str) -> TensorStorageMetadata:
    fields = _state(entry, _Tensor, f"the entry of {key}")
    size = _size(fields.get("size"), f"the size of {key}")
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, _Properties) else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise DamagedCheckpoint(f"{key} has no type")
    chunks = []
    stored = fields.get("chunks")
    for chunk in stored if isinstance(stored, list) else ():
        at = _state(chunk, _Chunk, f"a part of {key}")
        offsets = _size(at.get("offsets"), f"an offset of {key}")
        sizes = _size(at.get("sizes"), f"a part's size of {key}")
        if not len(offsets) == len(sizes) == len(size) or any(
            offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
        ):
            raise DamagedCheckpoint(f"a part of {key} is outside of its size {tuple(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if not chunks:
        raise DamagedCheckpoint(f"{key} has no parts")
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), size, chunks)


def _size(value: Any, what: str) -> torch.Size:
    numbers = value.arguments[0] if isinstance(value, _Size) and len(value.arguments) == 1 else None
    if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise DamagedCheckpoint(f"{what} is not a size")
    return torch.Size(numbers)


def _place(entry: Any) -> Place:
    fields = _state(entry, _Place, "an entry of storage_data")
    name, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if not is_plain_name(name) or "/" in name:
        raise DamagedCheckpoint(f"it names {name!r} as a file, which must be one in its own folder")
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise DamagedCheckpoint(f"it places a part of a tensor at byte {offset!r} of {name}, {length!r} bytes long")
    if fields.get("transform_descriptors"):
        raise DamagedCheckpoint(f"{name} is stored in another encoding, {fields['transform_descriptors']!r}")
    return Place(name, offset, length)


def incomplete(folder: Path, manifest: Manifest) -> str:
    """What the tensors of a checkpoint need and its manifest does not vouch for, as one sentence; empty if nothing.

    The manifest lists what was there when it was written; the metadata names what belongs there.
    """
    try:
        metadata = read_metadata(folder)
    except DamagedCheckpoint as error:
        return str(error)
    sizes = {entry.name: entry.size for entry in manifest.files}
    for name in (METADATA, STATE, CONFIG):
        if name not in sizes:
            return f"{folder / MANIFEST} does not list {name}"
    for index, place in metadata.storage_data.items():
        if place.relative_path not in sizes:
            return f"{folder / MANIFEST} does not list {place.relative_path}, which holds a part of {index.fqn}"
        if place.offset + place.length > sizes[place.relative_path]:
            return f"{folder / place.relative_path} is too short for the part of {index.fqn} that should be in it"
    return ""


class Reader(dcp.FileSystemReader):
    """DCP's reader of a checkpoint folder, with the metadata read as above, once."""

    def __init__(self, folder: Path, renamed: Renamed = RENAMED) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder, renamed)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata
