"""The kernels of ``kernels/`` as ``torch.ops.megatron_lsh.*``: loading, schemas, shapes, derivatives, when to use them.

Each function of this package that has a kernel asks :func:`usable` and else runs its plain PyTorch, which is the
reference the kernels are tested against. Legend: N rows sorted by expert, D features, C clusters, E experts, T tokens,
K choices per token, P = Q W columns of the projection.

Rows need not be materialised. Where an op takes ``index`` (int64 [N]), row n is row ``index[n]`` of a source that has one
row per token; with None, row n is row n. ``row_ends`` and ``cluster_ends`` (int64 [E]) are cumulative counts. Everything
runs on the current stream, allocates nothing whose size depends on data, and adds in a fixed order.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    # Packed key of each row: expert, then Q codes of code_bits each, largest first. From projection [M, P].
    "hash": "(Tensor projection, Tensor? index, Tensor row_ends, int num_hashes, int code_bits) -> Tensor",
    # Cut each expert's rows at its budget's weakest links -> cluster [N], order [N], sizes [C], offsets [C].
    "plan": "(Tensor key, Tensor projection, Tensor? index, Tensor row_ends, Tensor cluster_ends, "
    "int num_clusters, int num_hashes, int code_bits) -> (Tensor, Tensor, Tensor, Tensor)",
    # rows [N, D] @ rotation [D, P] in fp32. CPU only: a GPU has its library's matrix product.
    "project": "(Tensor rows, Tensor rotation) -> Tensor",
    # Nearest centroid of each row among its expert's -> cluster [N], squared distance [N] in fp32 or better.
    "nearest": "(Tensor rows, Tensor? index, Tensor centroids, Tensor row_ends, Tensor cluster_ends) "
    "-> (Tensor, Tensor)",
    # Give empty clusters the farthest rows of their expert -> cluster [N], order [N], sizes [C], offsets [C].
    "regroup": "(Tensor nearest, Tensor distance, Tensor row_ends, Tensor cluster_ends, int num_clusters) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    # Sum or mean of each cluster's rows, each times its weight (fp32 [N]) if there is one -> [C, D].
    "segment": "(Tensor source, Tensor? index, Tensor? weight, Tensor order, Tensor offsets, Tensor sizes, "
    "bool mean) -> Tensor",
    # Mean of each cluster's rows [C, D], and what each row differs from it [N, D].
    "segment_residual": "(Tensor source, Tensor order, Tensor offsets, Tensor sizes) -> (Tensor, Tensor)",
    # out[t] = sum_k weight[t, k] (source[i] / divisor[i] + row[t] - centroid[i]), i = index[t, k], skipping i < 0.
    "combine": "(Tensor source, Tensor index, Tensor? weight, Tensor? divisor, Tensor? row, Tensor? centroid) -> Tensor",
    # out[t, k] = <grad[t], source[i] + row[t] - centroid[i]>, 0 where i < 0.
    "dots": "(Tensor grad, Tensor source, Tensor index, Tensor? row, Tensor? centroid) -> Tensor",
    # out[t] = sum_k [weight[t, k] grad[t] - sum[i] / size[i]] + grad_centroid[i] / size[i]; no bracket where size is 1.
    "spread": "(Tensor? grad, Tensor? weight, Tensor? sum, Tensor? grad_centroid, Tensor index, Tensor sizes) -> Tensor",
    # Rows to bytes: WIRE_FORMATS[format] numbers, then the row's scale in fp32 -> uint8 [C, bytes]. noise [C, D] in [0, 1)
    # makes rounding stochastic.
    "encode": "(Tensor rows, Tensor? noise, int format) -> Tensor",
    "decode": "(Tensor payload, int format, int features, ScalarType dtype) -> Tensor",
    # The two below are differentiable in x, expert_out and weight. A slot is a (token, choice) pair; row_of_slot and
    # cluster_of_slot [T, K] are -1 where it has no row.
    # Mean of each cluster's rows -> [C, D].
    "compress": "(Tensor x, Tensor? index, Tensor order, Tensor offsets, Tensor sizes, Tensor cluster_of_slot) "
    "-> Tensor",
    # Weighted sum of each token's restored rows -> [T, D]. With x and centroid: the identity residual. With x alone: its
    # gradient without its value (straight-through). With neither: centroids' outputs as they are.
    "restore": "(Tensor expert_out, Tensor weight, Tensor? x, Tensor? centroid, Tensor index, Tensor row_of_slot, "
    "Tensor order, Tensor offsets, Tensor sizes, Tensor cluster_of_slot) -> Tensor",
}


#: The numbers of ``encode`` and ``decode``, by their index.
WIRE_FORMATS = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class Status:
    """Which kernels this process has.

    Attributes:
        devices: device types with kernels: a subset of {"cpu", "cuda"}.
        missing: why the others are not there, by device type.
    """

    devices: frozenset[str]
    missing: dict[str, str]

    def describe(self, device_type: str) -> str:
        """One line for the log: what runs LSH on this kind of device."""
        if device_type in self.devices:
            return f"LSH kernels: {device_type}"
        reason = self.missing.get(device_type, "there are no such kernels")
        return f"LSH kernels: none for {device_type} ({reason}); plain PyTorch instead"


def load(folder: Path) -> Status:
    """Load the shared libraries that setup.py left in ``folder`` (see ``build_into`` in kernels/build.py)."""
    report = folder / "_kernels.txt"
    reasons = dict(line.split(": ", 1) for line in report.read_text().splitlines()) if report.exists() else {}
    devices: set[str] = set()
    missing: dict[str, str] = {}
    for device in ("cpu", "cuda"):
        library = next(folder.glob(f"_kernels_{device}.*.so"), None)
        if device == "cuda" and not torch.cuda.is_available():
            missing[device] = "no CUDA device"
        elif library is None:
            missing[device] = reasons.get(device, f"not built; python kernels/build.py {device} builds them")
        elif (current := _sources_digest()) and library.name != f"_kernels_{device}.{current}.so":
            missing[device] = f"built from other sources; python kernels/build.py {device} builds them again"
        else:
            try:
                torch.ops.load_library(str(library))
                devices.add(device)
            except OSError as error:
                missing[device] = f"{library.name} cannot be loaded: {error}"
    return Status(frozenset(devices), missing)


def _sources_digest() -> str | None:
    """``digest`` of kernels/build.py, where this package lies beside its kernels' sources."""
    folder = Path(__file__).parents[2] / "kernels"
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    if not files:
        return None
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


_enabled: ContextVar[bool] = ContextVar("megatron_lsh_kernels")


@contextmanager
def reference_only() -> Iterator[None]:
    """Within this context the plain PyTorch functions run even where kernels are built (tests, benchmarks).

    Backward passes follow the forward that made them. ``MEGATRON_LSH_KERNELS=0`` in the environment does it for a whole run.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def usable(tensor: Tensor) -> bool:
    """Whether kernels can work on tensors like this one, here and now."""
    device = tensor.device.type
    if not _enabled.get(os.environ.get("MEGATRON_LSH_KERNELS") != "0"):
        return False
    if device not in STATUS.devices:
        if device in STATUS.missing:
            _announce(device)
        return False
    return tensor.dtype in _DTYPES or (tensor.dtype == torch.float64 and device == "cpu")


@functools.cache
def _announce(device: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(STATUS.describe(device), stacklevel=3)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, weights and distances over rows of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


# Shapes, for fake tensors and torch.compile.


def _plan_like(rows: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    long = functools.partial(rows.new_empty, dtype=torch.int64)
    return long(rows.shape[0]), long(rows.shape[0]), long(num_clusters), long(num_clusters)


def _fake_hash(projection: Tensor, index: Tensor | None, row_ends: Tensor, num_hashes: int, code_bits: int) -> Tensor:
    rows = projection if index is None else index
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


def _fake_plan(key: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _plan_like(key, rest[4])


def _fake_project(rows: Tensor, rotation: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], rotation.shape[1], dtype=torch.float32)


def _fake_nearest(
    rows: Tensor, index: Tensor | None, centroids: Tensor, row_ends: Tensor, cluster_ends: Tensor
) -> tuple[Tensor, Tensor]:
    count = (rows if index is None else index).shape[0]
    return rows.new_empty(count, dtype=torch.int64), rows.new_empty(count, dtype=accumulator(rows.dtype))


def _fake_regroup(
    nearest: Tensor, distance: Tensor, row_ends: Tensor, cluster_ends: Tensor, num_clusters: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _plan_like(nearest, num_clusters)


def _fake_segment(
    source: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    mean: bool,
) -> Tensor:
    return source.new_empty(sizes.shape[0], source.shape[1])


def _fake_segment_residual(source: Tensor, order: Tensor, offsets: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    return source.new_empty(sizes.shape[0], source.shape[1]), source.new_empty(source.shape)


def _fake_combine(source: Tensor, index: Tensor, *rest: Tensor | None) -> Tensor:
    return source.new_empty(index.shape[0], source.shape[1])


def _fake_dots(grad: Tensor, source: Tensor, index: Tensor, *rest: Tensor | None) -> Tensor:
    return source.new_empty(index.shape, dtype=accumulator(source.dtype))


def _fake_spread(
    grad: Tensor | None,
    weight: Tensor | None,
    sum: Tensor | None,
    grad_centroid: Tensor | None,
    index: Tensor,
    sizes: Tensor,
) -> Tensor:
    like = grad_centroid if grad is None else grad
    assert like is not None
    return like.new_empty(index.shape[0], like.shape[1])


def _fake_encode(rows: Tensor, noise: Tensor | None, format: int) -> Tensor:
    features = rows.shape[1]
    numbers = (features + 1) // 2 if WIRE_FORMATS[format] == "int4" else features
    return rows.new_empty(rows.shape[0], numbers + 4, dtype=torch.uint8)


def _fake_decode(payload: Tensor, format: int, features: int, dtype: torch.dtype) -> Tensor:
    return payload.new_empty(payload.shape[0], features, dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "hash": _fake_hash,
    "plan": _fake_plan,
    "project": _fake_project,
    "nearest": _fake_nearest,
    "regroup": _fake_regroup,
    "segment": _fake_segment,
    "segment_residual": _fake_segment_residual,
    "combine": _fake_combine,
    "dots": _fake_dots,
    "spread": _fake_spread,
    "encode": _fake_encode,
    "decode": _fake_decode,
}


class _TokenOps:
    """The differentiable ops over tokens: forward and backward in terms of the other ops of one namespace.

    compress:  c_j = mean of the rows of cluster j                      dx_t = sum_k gc_j / n_j
    restore:   y_t = sum_k p_tk (E_j + x_t - c_j),  j = cluster(t, k)    dE_j = G_j = sum of p_tk gy_t over the cluster
                                                                        dp_tk = <gy_t, E_j + x_t - c_j>
                                                                        dx_t = sum_k (p_tk gy_t - G_j / n_j)

    c is a function of x. Its part in restore's derivative is the mean in the last bracket, so restore sends no gradient to
    its argument ``centroid``; see ``docs/kernels.md``.
    """

    def __init__(self, ops: Any) -> None:
        """``ops``: ``torch.ops.megatron_lsh``, or another namespace with the same schemas."""
        self._ops = ops

    def compress(
        self,
        x: Tensor,
        index: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        sizes: Tensor,
        cluster_of_slot: Tensor,
    ) -> Tensor:
        return self._ops.segment(x, index, None, order, offsets, sizes, True)

    @staticmethod
    def save_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[4], inputs[5])

    def compress_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sizes, cluster_of_slot = ctx.saved_tensors
        return self._ops.spread(None, None, None, grad, cluster_of_slot, sizes), *([None] * 5)

    def restore(
        self,
        expert_out: Tensor,
        weight: Tensor,
        x: Tensor | None,
        centroid: Tensor | None,
        index: Tensor,
        row_of_slot: Tensor,
        order: Tensor,
        offsets: Tensor,
        sizes: Tensor,
        cluster_of_slot: Tensor,
    ) -> Tensor:
        row = None if centroid is None else x
        return self._ops.combine(expert_out, cluster_of_slot, weight, None, row, centroid)

    @staticmethod
    def save_restore(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def restore_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        expert_out, weight, x, centroid, index, row_of_slot, order, offsets, sizes, cluster_of_slot = ctx.saved_tensors
        row = None if centroid is None else x
        weight_of_row = by_row(weight, row_of_slot, index.shape[0])
        grad_out = self._ops.segment(grad, index, weight_of_row, order, offsets, sizes, False)
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = self._ops.dots(grad, expert_out, cluster_of_slot, row, centroid)
        if x is not None and ctx.needs_input_grad[2]:
            grad_x = self._ops.spread(grad, weight, grad_out, None, cluster_of_slot, sizes)
        return grad_out, grad_weight, grad_x, *([None] * 7)


def by_row(values_TK: Tensor, row_of_TK: Tensor, num_rows: int) -> Tensor:
    """[N]: the value of each row's slot. (A scatter, but no two slots share a row; the last place takes those without.)"""
    values_N = values_TK.new_zeros(num_rows + 1)
    values_N[torch.where(row_of_TK < 0, num_rows, row_of_TK)] = values_TK
    return values_N[:-1]


def define(namespace: str) -> None:
    """Register schemas, shapes and derivatives under a name. (Tests register the emulated CUDA kernels under another.)"""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{namespace}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    token = _TokenOps(getattr(torch.ops, namespace))
    for name, forward, backward, save in (
        ("compress", token.compress, token.compress_backward, token.save_compress),
        ("restore", token.restore, token.restore_backward, token.save_restore),
    ):
        torch.library.impl(f"{namespace}::{name}", "CompositeExplicitAutograd", forward)
        torch.library.register_fake(f"{namespace}::{name}", forward)
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=save)


define("megatron_lsh")
STATUS = load(Path(__file__).parent)
