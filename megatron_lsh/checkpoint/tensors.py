"""Model and optimizer as one flat dictionary of tensors, keyed by parameter name, and back.

    model.<name>                      parameters and persistent buffers
    optimizer.state.<name>.<key>      optimizer state of that parameter, e.g. exp_avg

Sharded tensors are DTensors, whose global shape and placement let torch.distributed.checkpoint (DCP) read them under any
other layout. Names and not positions identify optimizer state, so the grouping of parameters may change as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_lsh.errors import CheckpointError

MODEL = "model."
OPTIMIZER = "optimizer.state."
# How a step is executed, not what it computes: these belong to the machine and are never restored.
_EXECUTION_OPTIONS = {"params", "fused", "foreach", "capturable", "differentiable"}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; the tensors share memory with the model.

    Taking the state dict also puts ``fully_shard``-ed parameters back into their sharded form, which they are not in after
    an evaluation; `parameter_names` relies on it.
    """
    tensors = {}
    for name, value in get_model_state_dict(model).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} of the model is a {type(value).__name__}: only tensors can be saved")
        tensors[MODEL + name] = value
    return tensors


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> name, as in the state dict. Call `model_tensors` first."""
    names = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        names[parameter] = name
    return names


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors, and the rest of it as plain JSON.

    An optimizer that has made no step yet has no tensors. (torch's own ``get_optimizer_state_dict`` would make a step to
    create them, and the run would no longer be bit-equal to one that was never saved.)

    The JSON part is ``{"groups": [{"options": {"lr": ...}, "params": [names]}], "scalars": {name: {key: number}}}``.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        members = [_name_of(parameter, names) for parameter in group["params"]]
        options = {key: _plain(value) for key, value in group.items() if key not in _EXECUTION_OPTIONS}
        groups.append({"options": options, "params": members})
        for parameter, name in zip(group["params"], members, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{name}.{key}"] = value.detach()
                else:
                    scalars.setdefault(name, {})[key] = value
    return tensors, {"groups": groups, "scalars": scalars}


def _name_of(parameter: nn.Parameter, names: Mapping[nn.Parameter, str]) -> str:
    if parameter not in names:
        raise ValueError(f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model")
    return names[parameter]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def allocate_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], metadata: Metadata
) -> dict[str, Tensor]:
    """New tensors, sharded like the parameters, for all optimizer state that the checkpoint has of them."""
    saved: dict[str, list[str]] = {}
    for key in metadata.state_dict_metadata:
        if key.startswith(OPTIMIZER):
            name, _, entry = key[len(OPTIMIZER) :].rpartition(".")
            saved.setdefault(name, []).append(entry)
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = _name_of(parameter, names)
            for entry in saved.get(name, []):
                key = f"{OPTIMIZER}{name}.{entry}"
                stored = metadata.state_dict_metadata[key]
                if not isinstance(stored, TensorStorageMetadata):
                    raise CheckpointError(f"{key} in the checkpoint is not a tensor")
                dtype = stored.properties.dtype
                if len(stored.size) == 0 and parameter.ndim > 0:  # the step counter
                    tensors[key] = torch.zeros((), dtype=dtype)
                else:
                    tensors[key] = torch.zeros_like(parameter.detach(), dtype=dtype)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
) -> list[str]:
    """Put loaded tensors and numbers into the optimizer's state. Returns notices.

    Its settings (betas, epsilon, ...) stay those that it was made with: what the command line says holds.
    """
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in saved["scalars"].items()}
    for key, value in tensors.items():
        name, _, entry = key[len(OPTIMIZER) :].rpartition(".")
        by_name.setdefault(name, {})[entry] = value
    notices: list[str] = []
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    for group in optimizer.param_groups:
        members = [_name_of(parameter, names) for parameter in group["params"]]
        numbers = list(range(index, index + len(members)))
        index += len(members)
        for number, name in zip(numbers, members, strict=True):
            if name in by_name:
                state[number] = by_name[name]
            elif by_name:
                notices.append(f"the checkpoint has no optimizer state for {name}: it starts afresh")
        groups.append({**group, "params": numbers})
    # torch's own loader moves step counters to where fused optimizers want them, and runs the optimizer's hooks.
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return notices


def local_tensors(tensors: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """This rank's shard of every tensor. With `copy`, in CPU memory of its own, so that training may go on."""
    result = {}
    for key, tensor in tensors.items():
        shard = tensor.detach()
        if isinstance(shard, DTensor):
            shard = shard.to_local()
        if copy:
            shard = torch.empty_like(shard, device="cpu", memory_format=torch.contiguous_format).copy_(shard)
        result[key] = shard
    return result


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy `values`, the same on all ranks, into `tensor` or this rank's shard of it. No communication."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            shards = distribute_tensor(
                values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            )
            tensor.to_local().copy_(shards.to_local())
        else:
            tensor.copy_(values)


class SnapshotPlanner(DefaultSavePlanner):
    """Plans from the live tensors' shapes and placements, but takes the values from a snapshot of the local shards."""

    def __init__(self, snapshot: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._snapshot = snapshot

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._snapshot[write_item.index.fqn]


class PaddedLoadPlanner(DefaultLoadPlanner):
    """Loads tensors of the same shape, and the rows that both sides have of those whose padding differs."""

    def __init__(self, padded: set[str]) -> None:
        super().__init__()
        self._padded = padded

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        equal = {key: value for key, value in self.state_dict.items() if key not in self._padded}
        items = list(create_default_local_load_plan(equal, self.metadata).items)
        for key in sorted(self._padded):
            stored = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[key])
            items += create_read_items_for_chunk_list(key, stored, _chunks(self.state_dict[key]))
        return LoadPlan(items)


def _chunks(tensor: Tensor) -> list[ChunkStorageMetadata]:
    if isinstance(tensor, DTensor):
        return tensor.__create_chunk_list__()  # type: ignore[no-any-return]
    return [ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.size())]
