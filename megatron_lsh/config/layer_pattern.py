"""``--moe-layer-freq``: which layers are MoE layers."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from megatron_lsh.config.settings import shown
from megatron_lsh.errors import ConfigError

_LONGEST = 100_000  # characters and layers; keeps [0]*10000000000 from eating the memory


def moe_layer_pattern(
    freq: str | int | Sequence[int], num_layers: int, setting: str = "model.num_layers"
) -> list[bool]:
    """For each layer, whether it is an MoE layer.

    Args:
        freq: an integer n (layers 0, n, 2n, ... are MoE), or a list of 0 and 1, one per layer, possibly written as an
            expression of lists, ``+`` and ``*`` such as ``([0]*3+[1]*58)``.
        num_layers: number of transformer layers.
        setting: where that number comes from, for the error.

    Raises:
        ConfigError: if ``freq`` is neither, or a list of another length.
    """
    value = _evaluate(freq) if isinstance(freq, str) else freq
    if isinstance(value, int):
        if isinstance(value, bool) or value < 1:
            raise ConfigError(f"moe.moe_layer_freq ({shown(freq)}) must be at least 1: change --moe-layer-freq")
        return [layer % value == 0 for layer in range(num_layers)]
    if any(entry not in (0, 1) for entry in value):
        raise ConfigError(
            f"moe.moe_layer_freq ({shown(freq)}) must hold only 0 (dense) and 1 (MoE): change --moe-layer-freq"
        )
    if len(value) != num_layers:
        raise ConfigError(
            f"moe.moe_layer_freq ({shown(freq)}) has {len(value)} entries and must have one per layer, "
            f"{setting} ({num_layers}): change --moe-layer-freq or --{setting.split('.')[-1].replace('_', '-')}"
        )
    return [bool(entry) for entry in value]


def _evaluate(text: str) -> int | list[int]:
    """The value of an expression of integers, lists, ``+`` and ``*``. Nothing else is ever executed."""
    if re.fullmatch(r"\s*\d{1,9}\s*", text):
        return int(text)
    try:
        if len(text) > _LONGEST:
            raise ValueError("too long")
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"moe.moe_layer_freq ({shown(text)}) must be an integer or a list such as ([0]*3+[1]*58): "
            "change --moe-layer-freq"
        ) from error


def _value(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool) and number <= _LONGEST:
            return number
        case ast.List(elts=elements):
            return [_integer(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _checked(_list(left), 1) + _checked(_list(right), 1)
        case ast.BinOp(left=ast.Constant() as count, op=ast.Mult(), right=right):
            return _checked(_list(right), _integer(count)) * _integer(count)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _checked(_list(left), _integer(right)) * _integer(right)
    raise ValueError("not an integer, a list, a sum of lists or a multiple of a list")


def _integer(node: ast.expr) -> int:
    value = _value(node)
    if isinstance(value, int):
        return value
    raise ValueError("a list where an integer belongs")


def _list(node: ast.expr) -> list[int]:
    value = _value(node)
    if isinstance(value, list):
        return value
    raise ValueError("an integer where a list belongs")


def _checked(value: list[int], times: int) -> list[int]:
    if len(value) * times > _LONGEST:
        raise ValueError("too long")
    return value
