"""The kernels as ``torch.ops.megatron_lsh.*``: loading, schemas, shapes.

They run on the current stream, allocate nothing whose size depends on data, and add in a fixed order. What each computes
is said in plain.py; letters are those of the package's docstring.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.ops.dtypes import accumulator
from megatron_lsh.ops.wire_formats import FORMATS, SCALE_BYTES

#: Restoration by differences (differences.py says what each is); for CUDA only.
ON_GPUS = {
    "differences": "(Tensor rows, Tensor? order, Tensor cluster, Tensor representatives) -> (Tensor, Tensor)",
    "place": "(Tensor source, Tensor starts, Tensor widths, Tensor? mean, int places) -> Tensor",
    "fit": "(Tensor products, Tensor widths, float ridge, float width) -> (Tensor, Tensor, Tensor)",
    # Of positive definite fp32 matrices of at most 128 rows: lower triangular T, with T^T T their inverse.
    "half_inverse": "(Tensor matrices) -> Tensor",
    "split": "(Tensor inverse, Tensor widths, ScalarType dtype) -> (Tensor, Tensor)",
    "changes": "(Tensor products, Tensor square, Tensor slot, Tensor moves, Tensor among, Tensor scale) -> Tensor",
    "changes_backward": "(Tensor grad, Tensor products, Tensor square, Tensor slot, Tensor moves, Tensor among, "
    "Tensor scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "pairs": "(Tensor by_own, Tensor difference, Tensor by_inverse, Tensor among, Tensor scale, Tensor starts, "
    "Tensor widths) -> Tensor",
    "less": "(Tensor x, Tensor weight, Tensor offset, Tensor? order) -> Tensor",
}

SCHEMAS = ON_GPUS | {
    # Packed key of each row: expert, then Q codes of code_bits each, largest first. From projection [M, P].
    "hash": "(Tensor projection, Tensor? index, Tensor row_ends, int num_hashes, int code_bits) -> Tensor",
    # Cut each expert's rows at its budget's weakest links -> cluster [N], order [N], sizes [C], offsets [C].
    "plan": "(Tensor key, Tensor projection, Tensor? index, Tensor row_ends, Tensor cluster_ends, "
    "int num_clusters, int num_hashes, int code_bits) -> (Tensor, Tensor, Tensor, Tensor)",
    # rows [N, D] @ rotation [D, P] in fp32. CPU only: a GPU has its library's matrix product.
    "project": "(Tensor rows, Tensor rotation) -> Tensor",
    # Rows of each group times its matrix [B, X], or times the matrix transposed -> [N, X] or [N, B]. CPU only, fp32, fp64.
    "grouped": "(Tensor rows, Tensor matrices, Tensor starts, Tensor counts, Tensor widths, Tensor? order, "
    "bool transposed) -> Tensor",
    # left [N, B] transposed times right [N, X], over the rows of each group -> [G, B, X]. CPU only, fp32 and fp64.
    "grouped_outer": "(Tensor left, Tensor right, Tensor starts, Tensor counts, Tensor widths, Tensor? order) -> Tensor",
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
    # Of each cluster the row nearest to its mean [C], and over its rows the sums of |x - member|^2 and |x|^2 [C, 2].
    "members": "(Tensor rows, Tensor order, Tensor offsets, Tensor sizes) -> (Tensor, Tensor)",
    # out[t] = sum_k weight[t, k] (source[i] + row[t] - centroid[i]), i = index[t, k], skipping i < 0.
    "combine": "(Tensor source, Tensor index, Tensor? weight, Tensor? row, Tensor? centroid) -> Tensor",
    # out[t, k] = <grad[t], source[i] + row[t] - centroid[i]>, 0 where i < 0.
    "dots": "(Tensor grad, Tensor source, Tensor index, Tensor? row, Tensor? centroid) -> Tensor",
    # out[t] = sum_k [weight[t, k] grad[t] - sum[i] / size[i]] + grad_centroid[i] / size[i]; no bracket where size is 1.
    "spread": "(Tensor? grad, Tensor? weight, Tensor? sum, Tensor? grad_centroid, Tensor index, Tensor sizes) -> Tensor",
    # Rows to bytes: numbers in wire_formats.FORMATS[format], then the row's scale in fp32 -> uint8 [C, bytes].
    # noise [C, D] in [0, 1) makes rounding stochastic.
    "encode": "(Tensor rows, Tensor? noise, int format) -> Tensor",
    "decode": "(Tensor payload, int format, int features, ScalarType dtype) -> Tensor",
}


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


def _fake_grouped(
    rows: Tensor,
    matrices: Tensor,
    starts: Tensor,
    counts: Tensor,
    widths: Tensor,
    order: Tensor | None,
    transposed: bool,
) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[1 if transposed else 2])


def _fake_grouped_outer(left: Tensor, right: Tensor, starts: Tensor, *rest: Tensor | None) -> Tensor:
    return left.new_empty(starts.shape[0], left.shape[1], right.shape[1])


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


def _fake_members(rows: Tensor, order: Tensor, offsets: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    count = sizes.shape[0]
    return rows.new_empty(count, dtype=torch.int64), rows.new_empty(count, 2, dtype=accumulator(rows.dtype))


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
    numbers = (features + 1) // 2 if FORMATS[format] == "int4" else features
    return rows.new_empty(rows.shape[0], numbers + SCALE_BYTES, dtype=torch.uint8)


def _fake_decode(payload: Tensor, format: int, features: int, dtype: torch.dtype) -> Tensor:
    return payload.new_empty(payload.shape[0], features, dtype=dtype)


def _fake_differences(
    rows: Tensor, order: Tensor | None, cluster: Tensor, representatives: Tensor
) -> tuple[Tensor, Tensor]:
    offset = rows.new_empty(cluster.shape[0], rows.shape[1])
    return offset, offset.new_empty(cluster.shape[0], dtype=torch.float32)


def _fake_place(source: Tensor, starts: Tensor, widths: Tensor, mean: Tensor | None, places: int) -> Tensor:
    return source.new_empty(widths.shape[0], places, source.shape[1])


def _fake_fit(products: Tensor, widths: Tensor, ridge: float, width: float) -> tuple[Tensor, Tensor, Tensor]:
    return products.new_empty(products.shape[0]), torch.empty_like(products), torch.empty_like(products)


def _fake_split(inverse: Tensor, widths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups, places, _ = inverse.shape
    return tuple(inverse.new_empty(groups, n * places, places, dtype=dtype) for n in (3, 2))  # type: ignore[return-value]


def _fake_changes(products: Tensor, *rest: Tensor) -> Tensor:
    return products.new_empty(products.shape[0], 3 * products.shape[1])


def _fake_changes_backward(grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return *(torch.empty_like(grad) for _ in range(4)), grad.new_empty(grad.shape[0], dtype=torch.float32)


def _fake_pairs(by_own: Tensor, difference: Tensor, by_inverse: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(by_inverse)


def _fake_less(x: Tensor, *rest: Tensor | None) -> Tensor:
    return torch.empty_like(x)


_FAKES: dict[str, Callable[..., Any]] = {
    "differences": _fake_differences,
    "place": _fake_place,
    "fit": _fake_fit,
    "half_inverse": torch.empty_like,
    "split": _fake_split,
    "changes": _fake_changes,
    "changes_backward": _fake_changes_backward,
    "pairs": _fake_pairs,
    "less": _fake_less,
    "hash": _fake_hash,
    "plan": _fake_plan,
    "project": _fake_project,
    "grouped": _fake_grouped,
    "grouped_outer": _fake_grouped_outer,
    "nearest": _fake_nearest,
    "regroup": _fake_regroup,
    "segment": _fake_segment,
    "segment_residual": _fake_segment_residual,
    "members": _fake_members,
    "combine": _fake_combine,
    "dots": _fake_dots,
    "spread": _fake_spread,
    "encode": _fake_encode,
    "decode": _fake_decode,
}


def define(namespace: str) -> None:
    """Register schemas and shapes under a name. (Tests register the emulated CUDA kernels under another.)"""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{namespace}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name])


define("megatron_lsh")
STATUS = load(Path(__file__).parent)
