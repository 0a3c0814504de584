"""What the tests of this folder share besides tiny models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_lsh.convert import Checks
from megatron_lsh.convert.source import Source, all_pieces

QUIET = Checks(say=lambda text: None)


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file, read with the reference implementation."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def assert_bit_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def native_tensors(source: Source) -> dict[str, Tensor]:
    """A source, whole."""
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in source.tensors.items()}
    for rows in all_pieces(source):
        tensors[rows.name][rows.first : rows.first + rows.count] = source.read(rows)
    return tensors


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
