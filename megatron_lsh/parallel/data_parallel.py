"""Data parallelism over the two meshes: sharding the model, accumulating, finalising and clipping gradients.

Gradients follow one convention: after ``finalize_gradients`` the gradient of any parameter is the mean over data
parallel ranks (dp = world / (tp * cp * pp) of them) of the gradient of each one's loss, of which context parallel ranks
have shares that add up. fully_shard takes the mean over dp and cp. Experts see the tokens of all ranks of their expert
parallel group, so the sum over the copies of an expert is already the sum over all of dp and cp. Only the divisors differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from megatron_lsh.config.parallel import PrecisionConfig
from megatron_lsh.parallel.collectives import all_reduce_
from megatron_lsh.parallel.context import DENSE_DATA, EXPERT_DATA, ParallelContext
from megatron_lsh.parallel.parameters import NOTES, is_copy, is_expert, local


def shard_model(model: nn.Module, ctx: ParallelContext, precision: PrecisionConfig) -> nn.Module:
    """Make every parameter a DTensor over its data parallel mesh, in place, and return `model`.

    Modules with ``expert_fsdp_unit = True`` go over ctx.expert_mesh, those with ``fsdp_unit = True`` and the rest of
    the model over ctx.dense_mesh. In 16 bits the DTensors stay fp32 (the master weights), forward sees rounded copies and
    gradients are accumulated and reduced in fp32, also over tensor parallel ranks and over several uses of a parameter.

    What fully_shard asks of the model: parameters are gathered when their unit is called, so they are used inside its
    forward() only; and every rank calls the same units and gets a gradient (of zeros, if need be) for the same
    parameters, also an expert rank without tokens. Otherwise ranks disagree on what to reduce, and wait for ever.
    """
    if ctx.dense_mesh is None or ctx.expert_mesh is None:
        raise ValueError("shard_model needs a context made by initialize(); this one has no process groups")
    notes = {
        name: {note: getattr(param, note) for note in NOTES if hasattr(param, note)}
        for name, param in model.named_parameters()
    }
    rounded = compute_dtype(precision) if precision.half else None
    policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32, cast_forward_inputs=False)
    dense, expert = ctx.dense_mesh[DENSE_DATA], ctx.expert_mesh[EXPERT_DATA]
    for module in model.modules():
        if getattr(module, "expert_fsdp_unit", False):
            _fully_shard(module, expert, policy)
    units = [module for module in model.modules() if module is not model and getattr(module, "fsdp_unit", False)]
    for module in units if isinstance(model, FSDPModule) else [*units, model]:
        _fully_shard(module, dense, policy)
        if precision.half:
            module.register_forward_pre_hook(_collect_gradients_in_fp32)
    for name, param in model.named_parameters():
        for note, value in notes[name].items():
            setattr(param, note, value)
    model.register_forward_hook(_reshard_after_evaluation)
    return model


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """What matrices are multiplied in."""
    if precision.fp16:
        return torch.float16
    return torch.bfloat16 if precision.bf16 else torch.float32


def _reshard_after_evaluation(model: nn.Module, _inputs: object, _output: object) -> None:
    """Backward reshards; without it model.parameters() would go on naming gathered copies that nothing updates."""
    if not torch.is_grad_enabled():
        reshard(model)


def _fully_shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    shards = mesh.size(1)

    def placement(param: nn.Parameter) -> Shard:
        """A dimension that tensor or expert parallelism has not split, and that splits evenly; else the first."""
        taken = {p.dim for p in param.placements if isinstance(p, Shard)} if isinstance(param, DTensor) else set()
        free = [dim for dim, size in enumerate(param.shape) if dim not in taken and size % shards == 0]
        return Shard(free[0] if free else 0)

    fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=False)


def _collect_gradients_in_fp32(unit: nn.Module, _inputs: object) -> None:
    """The 16-bit copies that forward sees would sum their gradients in 16 bits before fully_shard gets them: the shares of
    tensor parallel ranks (see ``local``), and those of several uses, as of tied embeddings. Experts have neither."""
    for param in _own_parameters(unit):
        if param.requires_grad:
            param.grad_dtype = torch.float32


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Without those of the units inside. All get gradients of one dtype, because they are reduced in one buffer."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


def accumulate(model: nn.Module, last: bool) -> None:
    """Call before each micro-batch: gradients are reduced over ranks, and parameters resharded, after the last only.

    Until then model.parameters() are the gathered parameters of this rank, and their .grad is not to be looked at.
    """
    for module in _roots(model):
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Drop gathered parameters. Needed only where a forward with gradients enabled was not followed by backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _roots(model: nn.Module) -> Iterator[FSDPModule]:
    if isinstance(model, FSDPModule):
        yield model
        return
    for child in model.children():
        yield from _roots(child)


def expert_grad_scale(ctx: ParallelContext) -> float:
    """What turns the mean over the copies of an expert into a sum divided by the data parallel size."""
    return ctx.layout.edp / ctx.layout.dp


def dense_grad_scale(ctx: ParallelContext) -> float:
    """The same for the mean over the copies of a dense parameter."""
    return float(ctx.layout.cp)


@torch.no_grad()
def finalize_gradients(model: nn.Module, ctx: ParallelContext, loss_scale: float = 1.0) -> None:
    """Call once after the last micro-batch's backward, before clipping. `loss_scale`: what the loss was multiplied by."""
    of_experts, dense = expert_grad_scale(ctx), dense_grad_scale(ctx)
    for param in model.parameters():
        scale = (of_experts if is_expert(param) else dense) / loss_scale
        if scale != 1.0 and param.grad is not None:
            local(param.grad).mul_(scale)


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor], ctx: ParallelContext) -> Tensor:
    """L2 norm, fp32 and identical on all ranks, of tensors spread over any meshes. One all-reduce.

    A tensor that n ranks hold alike contributes on each of them with weight 1/n. A plain tensor counts as held by all
    ranks of the pipeline stage. Raises ValueError for a DTensor with pending partial sums.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_copies[_copies(tensor, ctx.stage.size)].append(local(tensor))
    total = torch.zeros((), dtype=torch.float32, device=ctx.device)
    for copies, parts in sorted(by_copies.items()):
        total += torch.nn.utils.get_total_norm(parts).float().square() / copies
    return all_reduce_(total, ctx.world).sqrt()


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float, ctx: ParallelContext) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before.

    The norm is an fp32 scalar, identical on all ranks; it is not finite if any gradient on any rank is not.
    """
    params = [param for param in model.parameters() if param.grad is not None]
    norm = global_norm([param.grad for param in params if not is_copy(param)], ctx)  # type: ignore[misc]
    if max_norm > 0:
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for param in params:
            local(param.grad).mul_(coefficient)  # type: ignore[arg-type]
    return norm


def counted_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of this pipeline stage that no other stage counts."""
    return [param for param in model.parameters() if not is_copy(param)]


@torch.no_grad()
def sum_tied_gradients(tied: Iterable[Tensor], ctx: ParallelContext) -> None:
    """Give parameters that the first and the last pipeline stage both hold the sum of both gradients. Collective over the
    two; call it before ``finalize_gradients``."""
    for param in tied:
        if param.grad is not None:
            all_reduce_(local(param.grad), ctx.ends)


def num_parameters(model: nn.Module) -> int:
    """Parameters of this pipeline stage, each counted once, whatever the rest of the layout."""
    return sum(math.prod(getattr(param, "global_shape", param.shape)) for param in counted_parameters(model))


def num_local_parameters(model: nn.Module) -> int:
    """Parameters of which this rank holds the values (with a sharded optimizer: its shards)."""
    return sum(local(param).numel() for param in model.parameters())


def _copies(tensor: Tensor, stage_size: int) -> int:
    """How many ranks of a pipeline stage hold the same elements."""
    if not isinstance(tensor, DTensor):
        return stage_size
    mesh, copies = tensor.device_mesh, stage_size // tensor.device_mesh.size()
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(f"a gradient has pending sums ({tensor.placements}): shard_model was not called")
        if placement.is_replicate():
            copies *= mesh.size(dim)
    return copies
