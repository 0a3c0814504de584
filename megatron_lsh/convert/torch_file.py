"""One ``torch.save`` file, read and written without its tensors ever being in memory, and without running what it pickles.

torch stores tensors uncompressed, each storage in one piece. Loading under ``FakeTensorMode`` gives shapes and the place
of every storage in the file; ``skip_data`` writes a file with room for the tensors, to be filled in afterwards.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lsh.convert.source import TensorSpec, bytes_of
from megatron_lsh.errors import CheckpointError, first_line

# Classes that files of Megatron-LM and of Swin-Transformer name beside tensors: settings, random states, bookkeeping. None
# of it is used, so what is made of them is an object that ignores its contents.
_INERT = (
    "_io.BytesIO",
    "megatron.core.enums.ModelType",
    "megatron.core.enums.Fp4Recipe",
    "megatron.core.enums.Fp8Recipe",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.ModelType",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
)
# Dictionaries of classes of their own, which are made as plain ones: torch sets items of no others.
_DICTIONARIES = ("yacs.config.CfgNode",)


class Inert:
    """Stands in for an object of a file: takes any arguments and any state, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file and the byte at which it starts."""

    file: Path
    begin: int
    spec: TensorSpec

    def read(self) -> Tensor:
        """Raises CheckpointError."""
        tensor = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.begin)
                if stream.readinto(bytes_of(tensor)) != self.spec.nbytes:
                    raise OSError("the file ended early")
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror or error}: copy it again") from None
        return tensor


@contextmanager
def _allowed() -> Iterator[None]:
    """Within, torch makes the classes above and its own, but none that another library in this process has allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    plain: list[Any] = [(OrderedDict, name) for name in _DICTIONARIES]
    torch.serialization.add_safe_globals([argparse.Namespace, *((Inert, name) for name in _INERT), *plain])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def open_torch_file(file: Path) -> dict[str, Any]:
    """What the file holds, with a `StoredTensor` in place of every tensor.

    Only torch's weights-only unpickler reads it, which makes nothing but tensors, containers and the classes above.
    Raises CheckpointError: naming the file, and the class that it is not willing to make.
    """
    try:
        with _allowed():
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if not foreign:
                with FakeTensorMode():
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # torch's unpickler indexes its memo and its stack as the file says: whatever comes of it
        raise CheckpointError(
            f"{file} cannot be read ({first_line(error)}): it is damaged, or not a file of torch.save"
        ) from None
    if foreign:
        raise CheckpointError(
            f"{file} holds objects of {', '.join(sorted(foreign)[:3])}, which are not made from a file for safety: save it "
            "again without them (in Megatron-LM with --no-save-optim --no-save-rng)"
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__} and not a dictionary: is it a checkpoint?")
    result: dict[str, Any] = _located(content, file)
    return result


def _located(value: Any, file: Path) -> Any:
    """Replace fake tensors, through containers."""
    if isinstance(value, Tensor):
        begin = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if begin is None or not value.is_contiguous():
            return None  # not a plain tensor in the file; missing where it should have been one
        begin += value.storage_offset() * value.dtype.itemsize
        return StoredTensor(file, begin, TensorSpec(tuple(value.shape), value.dtype))
    if isinstance(value, dict):
        return {key: _located(entry, file) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_located(entry, file) for entry in value]
    return value


class TorchFileWriter:
    """A ``torch.save`` file of ``content`` and, under ``content["model"]``, the announced tensors, which start as zeros.

    Raises OSError.
    """

    def __init__(self, file: Path, content: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
        with FakeTensorMode():
            model = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in tensors.items()}
            try:
                with torch.serialization.skip_data(materialize_fake_tensors=True):
                    torch.save({**content, "model": model}, file)
            except RuntimeError as error:  # what torch makes of an error of the disk
                text = "torch.save failed, perhaps for lack of space"
                raise OSError(errno.EIO, text, str(file)) from error
        self._places: dict[str, StoredTensor] = open_torch_file(file)["model"]
        self._stream = open(file, "r+b")  # noqa: SIM115

    def write(self, name: str, value: Tensor, first_row: int = 0) -> None:
        """Fill in a tensor, or the rows of it that begin with `first_row`."""
        place = self._places[name]
        row = place.spec.nbytes // max(place.spec.shape[0], 1)
        self._stream.seek(place.begin + first_row * row)
        self._stream.write(bytes_of(value.contiguous()))

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
