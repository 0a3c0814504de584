"""Parameters that had another name in earlier versions: checkpoints of then load under the names of now.

A line of `RENAMED` is (pattern of the old name, new name), applied in order with `re.sub` to the full name of a parameter,
such as ``decoder.layers.0.mlp.router.weight``. That one line renames the weights, the optimizer's tensors, and the names in
the optimizer's groups and scalars, since the reader takes all of them through here. Saving knows the new names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

#: (pattern of the old name, new name). A pattern must not match any name that is in use now.
RENAMED: tuple[tuple[str, str], ...] = (
    # The learned map of --lsh-residual lowrank became a part of the dispatcher's restoration.
    (r"\.mlp\.compressor\.low_rank\.", ".mlp.dispatcher.lsh.path.compressor.restore.low_rank."),
)

T = TypeVar("T")
Renamed = Iterable[tuple[str, str]]


def present_name(name: str, renamed: Renamed = RENAMED) -> str:
    """What the parameter that was saved as `name` is called now."""
    for pattern, replacement in renamed:
        name = re.sub(pattern, replacement, name)
    return name


def rename_keys(values: Mapping[str, T], renamed: Renamed = RENAMED) -> dict[str, T]:
    """The same values under the present names."""
    return {present_name(name, renamed): value for name, value in values.items()}


def rename_optimizer(saved: Mapping[str, Any], renamed: Renamed = RENAMED) -> dict[str, Any]:
    """The JSON part of `megatron_lsh.checkpoint.tensors.optimizer_tensors` under the present names."""
    groups = [
        {**group, "params": [present_name(name, renamed) for name in group["params"]]} for group in saved["groups"]
    ]
    return {**saved, "groups": groups, "scalars": rename_keys(saved["scalars"], renamed)}
