"""Every op against its definition, for the CPU twins and the CUDA sources alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lsh.lsh import Clusters, cluster_by_budget, cluster_sizes, codes_of
from megatron_lsh.moe.wire import make_codec
from megatron_lsh.ops import PlainOps, accumulator, reference_only
from megatron_lsh.ops.clustering import refill_empty
from megatron_lsh.ops.wire_formats import FORMATS
from tests.kernels.cases import (
    COUNTS,
    Case,
    assert_close,
    packed_keys,
    plain_restored,
    plain_segments,
)
from tests.kernels.conftest import Backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One number, odd sizes, whole vectors, more than a warp's vectors, around the CPU's block of features.
FEATURES = [1, 7, 8, 40, 264]


# Hash.


@pytest.mark.parametrize(("hashes", "width"), [(1, 1), (2, 8), (6, 16), (3, 33), (1, 100)])
@pytest.mark.parametrize("counts", [[0], [1], [3, 0, 40]], ids=str)
def test_hash(backend: Backend, counts: list[int], hashes: int, width: int) -> None:
    case = Case(counts, hashes * width, device=backend.device, exact=True)  # whole numbers: many equal maxima
    projection = case.rows
    projection[::7] = 0
    bits = (2 * width - 1).bit_length()
    with reference_only():
        codes = codes_of(projection, hashes)
    key = backend.ops.hash(projection, None, case.row_ends, hashes, bits)
    assert torch.equal(key.cpu(), packed_keys(codes.cpu(), counts, bits))


def test_hash_reads_through_an_index(backend: Backend) -> None:
    case = Case([20, 13], 12, device=backend.device)
    index = torch.randint(9, (33,), generator=case.generator).to(backend.device)
    projection = case.floats(9, 12)
    got = backend.ops.hash(projection, index, case.row_ends, 3, 3)
    assert torch.equal(got, backend.ops.hash(projection[index], None, case.row_ends, 3, 3))


# Plan and regroup.


def check_plan(case: Case, got: tuple[Tensor, ...], expected: Clusters) -> None:
    for name, values in zip(("cluster_N", "order_N", "sizes_C", "offsets_C"), got, strict=True):
        assert torch.equal(values, getattr(expected, name)), f"{name} for {case}"


def plan(backend: Backend, case: Case, projection: Tensor, hashes: int) -> tuple[tuple[Tensor, ...], Clusters]:
    bits = (2 * (projection.shape[1] // hashes) - 1).bit_length()
    key = backend.ops.hash(projection, None, case.row_ends, hashes, bits)
    got = backend.ops.plan(
        key, projection, None, case.row_ends, case.cluster_ends, case.num_clusters, hashes, bits
    )  # fmt: skip
    counts, budgets = (torch.tensor(numbers, device=backend.device) for numbers in (case.counts, case.budgets))
    with reference_only():
        codes = codes_of(projection, hashes)
        width = projection.shape[1] // hashes
        expected = cluster_by_budget(codes, projection, counts, budgets, case.num_clusters, 2 * width)
    return got, expected


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_plan(backend: Backend, counts: list[int], rate: float) -> None:
    for exact in (False, True):
        case = Case(counts, 12, device=backend.device, rate=rate, exact=exact)
        check_plan(case, *plan(backend, case, case.rows, 3))


def test_plan_when_all_rows_are_equal(backend: Backend) -> None:
    case = Case([70, 0, 3], 12, device=backend.device, rate=0.2)
    check_plan(case, *plan(backend, case, case.rows[:1].expand(73, 12).contiguous(), 3))


def test_plan_reads_through_an_index(backend: Backend) -> None:
    case = Case([40, 25], 12, device=backend.device)
    index = torch.randint(30, (65,), generator=case.generator).to(backend.device)
    projection = case.floats(30, 12)
    key = backend.ops.hash(projection, index, case.row_ends, 3, 3)
    sizes = (case.row_ends, case.cluster_ends, case.num_clusters, 3, 3)
    got = backend.ops.plan(key, projection, index, *sizes)
    for values, expected in zip(got, backend.ops.plan(key, projection[index], None, *sizes), strict=True):
        assert torch.equal(values, expected)


def test_rows_and_clusters_that_no_expert_owns(backend: Backend) -> None:
    """On the CPU an error. A GPU's counts cannot be read without waiting, so its kernels stay inside their arrays."""
    case = Case([40, 25], 12, device=backend.device)
    rows, clusters = case.num_rows + 5, case.num_clusters + 2
    projection = case.floats(rows, 12)
    key = backend.ops.hash(projection, None, case.row_ends, 3, 3)
    plan = (key, projection, None, case.row_ends, case.cluster_ends, clusters, 3, 3)
    nearest = torch.zeros(rows, dtype=torch.int64, device=backend.device)
    nearest[40:] = case.budgets[0]
    regroup = (nearest, case.floats(rows).abs(), case.row_ends, case.cluster_ends, clusters)
    if backend.name == "cpu":
        for name, arguments in (("plan", plan), ("regroup", regroup)):
            with pytest.raises(RuntimeError, match="row_ends must rise to the number of rows, 70"):
                getattr(backend.ops, name)(*arguments)
        return
    for cluster, order, sizes, offsets in (backend.ops.plan(*plan), backend.ops.regroup(*regroup)):
        assert torch.equal(order.sort().values.cpu(), torch.arange(rows)) and order[-5:].tolist() == [*range(65, 70)]
        assert ((cluster >= 0) & (cluster < clusters)).all()
        assert sizes[-2:].tolist() == [0, 0] and int(sizes.sum()) == 65 and offsets[-2:].tolist() == [rows, rows]


def test_an_expert_without_clusters_for_its_rows_is_an_error() -> None:
    ends = (torch.tensor([3, 5]), torch.tensor([2, 2]))
    with pytest.raises(RuntimeError, match="expert 1 has 2 rows and 0 clusters"):
        torch.ops.megatron_lsh.regroup(torch.zeros(5, dtype=torch.int64), torch.zeros(5), *ends, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_another_device_are_refused() -> None:
    rows, order, one = torch.ones(2, 8, device="cuda"), torch.arange(2), torch.ones(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="order must be on the same device"):
        torch.ops.megatron_lsh.segment(rows, None, None, order, order, one, False)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_regroup(backend: Backend, counts: list[int], crowded: bool) -> None:
    case = Case(counts, 1, device=backend.device, exact=True)
    nearest = case.clusters.cluster_N
    if crowded:  # all rows in their expert's first cluster
        nearest = (case.cluster_ends - torch.tensor(case.budgets, device=backend.device)).repeat_interleave(
            torch.tensor(counts, device=backend.device)
        )
    distance = case.floats(case.num_rows).abs()  # with ties
    got = backend.ops.regroup(nearest, distance, case.row_ends, case.cluster_ends, case.num_clusters)
    counts_E, budgets_E = (torch.tensor(numbers, device=backend.device) for numbers in (counts, case.budgets))
    refilled = refill_empty(nearest, distance, counts_E, budgets_E, case.num_clusters) if case.num_rows else nearest
    expected = Clusters.from_assignment(refilled, cluster_sizes(refilled, case.num_clusters), budgets_E)
    check_plan(case, got, expected)
    assert (got[2] > 0).all(), "no cluster is emptied to fill another"


# Nearest.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "features", "rate"),
    [
        ([0, 1], 8, 1.0),
        ([5, 0, 1], 7, 0.5),
        ([70, 3], 40, 0.9),
        ([130], 16, 0.99),
        ([40], 530, 0.5),
        ([64, 60], 33, 0.2),
    ],
    ids=str,
)
def test_nearest(backend: Backend, dtype: torch.dtype, counts: list[int], features: int, rate: float) -> None:
    backend.check_dtype(dtype)
    for exact in (True, False):
        case = Case(counts, features, dtype, backend.device, rate, exact=exact)
        centroids = case.floats(case.num_clusters, features)
        if case.num_clusters > 3:
            centroids[case.num_clusters // 2] = centroids[0]  # a tie
        cluster, distance = backend.ops.nearest(case.rows, None, centroids, case.row_ends, case.cluster_ends)
        assert distance.dtype == accumulator(dtype)
        all_distances = torch.cdist(case.rows.double(), centroids.double()).square()
        experts = [torch.arange(len(counts)).repeat_interleave(torch.tensor(n)) for n in (counts, case.budgets)]
        foreign = experts[0][:, None] != experts[1][None]
        all_distances = all_distances.masked_fill(foreign.to(backend.device), float("inf"))
        if case.num_rows == 0:
            continue
        best, first = all_distances.min(1)
        slack = {"rtol": 1e-4, "atol": 1e-4 * features} if dtype != torch.float64 else {}
        torch.testing.assert_close(distance.double(), best, **slack)
        chosen = all_distances.gather(1, cluster[:, None]).squeeze(1)
        torch.testing.assert_close(chosen, best, **slack)
        if exact:
            assert torch.equal(cluster, first), "the first of the nearest"


def test_nearest_reads_through_an_index(backend: Backend) -> None:
    for features in (16, 9):
        case = Case([70, 20], features, torch.bfloat16, backend.device)
        index = torch.randint(50, (90,), generator=case.generator).to(backend.device)
        source, centroids = case.floats(50, features), case.floats(case.num_clusters, features)
        ends = (case.row_ends, case.cluster_ends)
        got = backend.ops.nearest(source, index, centroids, *ends)
        for values, expected in zip(got, backend.ops.nearest(source[index], None, centroids, *ends), strict=True):
            assert torch.equal(values, expected)


def test_nearest_survives_numbers_that_are_none(backend: Backend) -> None:
    case = Case([70], 16, torch.bfloat16, backend.device)
    rows = case.rows.clone()
    rows[3], rows[5] = float("nan"), float("inf")
    cluster, _ = backend.ops.nearest(rows, None, case.floats(case.num_clusters, 16), case.row_ends, case.cluster_ends)
    assert ((cluster >= 0) & (cluster < case.num_clusters)).all()


def test_project(cpu_kernels: None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, features, columns in [(0, 5, 3), (1, 1, 1), (70, 515, 96), (64, 40, 49)]:
            case = Case([rows], features, dtype)
            rotation = torch.randn(features, columns, generator=case.generator)
            got = torch.ops.megatron_lsh.project(case.rows, rotation)
            torch.testing.assert_close(got.double(), case.rows.double() @ rotation.double(), rtol=1e-5, atol=1e-3)


# Segments.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_segment(backend: Backend, dtype: torch.dtype, counts: list[int]) -> None:
    backend.check_dtype(dtype)
    for features in FEATURES:
        case = Case(counts, features, dtype, backend.device)
        cluster_N, size = case.clusters.cluster_N, case.num_clusters
        weight = case.floats(case.num_rows).to(accumulator(dtype))
        for mean, weights in ((False, None), (True, None), (False, weight)):
            got = backend.ops.segment(case.rows, None, weights, *case.order, mean)
            assert got.dtype == dtype
            assert_close(got, plain_segments(case.rows, weights, cluster_N, size, mean))
        means, residual = backend.ops.segment_residual(case.rows, *case.order)
        assert torch.equal(means, backend.ops.segment(case.rows, None, None, *case.order, True))
        assert_close(residual, case.rows.double() - means.double()[cluster_N])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_reads_through_an_index(backend: Backend, dtype: torch.dtype) -> None:
    backend.check_dtype(dtype)
    case = Case([60, 45], 24, dtype, backend.device)
    source, weight = case.floats(50, 24), case.floats(105).to(accumulator(dtype))
    index = torch.randint(50, (105,), generator=case.generator).to(backend.device)
    got = backend.ops.segment(source, index, weight, *case.order, False)
    assert torch.equal(got, backend.ops.segment(source[index], None, weight, *case.order, False))


def test_segment_of_one_hot_cluster(backend: Backend) -> None:
    """Long clusters are cut into windows on a GPU: every alignment of windows and cluster borders."""
    for before in (0, 1, 127, 128, 129):
        case = Case([before + 400 + 30], 3, device=backend.device, exact=True)
        cluster_N = torch.tensor([0] * before + [1] * 400 + [2] * 30)
        sizes = torch.tensor([before, 400, 30])
        clusters = Clusters.from_assignment(cluster_N, sizes, torch.tensor([3]))
        order = [t.to(backend.device) for t in (clusters.order_N, clusters.offsets_C, clusters.sizes_C)]
        got = backend.ops.segment(case.rows, None, None, *order, False)
        assert torch.equal(got.double(), plain_segments(case.rows, None, cluster_N.to(backend.device), 3, False))


# Members.


def check_members(case: Case, member: Tensor, energy: Tensor) -> None:
    """Against distances in fp64."""
    order, offsets, sizes = case.order
    rows, cluster = case.rows.double(), case.clusters.cluster_N
    means = plain_segments(rows, None, cluster, len(sizes), True)
    distance = (rows - means[cluster]).square().sum(1)
    numbers = torch.arange(len(sizes), device=rows.device)
    there = sizes > 0
    assert torch.equal(cluster[member][there], numbers[there])
    assert torch.equal(member[~there], order[offsets.clamp(max=case.num_rows - 1)][~there])
    least = torch.full_like(distance[:1], torch.inf).expand(len(sizes)).scatter_reduce(0, cluster, distance, "amin")
    slack = {"rtol": 1e-5, "atol": 1e-5 * case.features} if energy.dtype == torch.float32 else {}
    torch.testing.assert_close(distance[member][there], least[there], **slack)
    pairs = sizes <= 2
    assert torch.equal(member[pairs & there], order[offsets.clamp(max=case.num_rows - 1)][pairs & there]), (
        "the first of two"
    )
    apart = (rows - rows[member[cluster]]).square().sum(1)
    expected = [plain_segments(t[:, None], None, cluster, len(sizes), False) for t in (apart, rows.square().sum(1))]
    torch.testing.assert_close(energy.double(), torch.cat(expected, 1), **slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_members(backend: Backend, dtype: torch.dtype, counts: list[int]) -> None:
    backend.check_dtype(dtype)
    # The last is more than a block of threads takes at a time.
    for features in (1, 7, 40, 2056) if dtype == torch.bfloat16 else (3, 264):
        case = Case(counts, features, dtype, backend.device)
        got = backend.ops.members(case.rows, *case.order)
        assert got[1].dtype == accumulator(dtype) and got[1].shape == (case.num_clusters, 2)
        if case.num_rows:
            check_members(case, *got)
            check_members(case, *PlainOps().members(case.rows, *case.order))


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    features=st.sampled_from([1, 4, 5, 9]),
    exact=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=30)
def test_members_of_any_clusters(backend: Backend, sizes: list[int], features: int, exact: bool, seed: int) -> None:
    """Any sizes, rows that are equal, in any order."""
    case = Case([sum(sizes)], features, torch.float32, backend.device, seed=seed, exact=exact)
    cluster = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    cluster = cluster[torch.randperm(len(cluster), generator=case.generator)]
    of_cluster = (cluster, torch.tensor(sizes), torch.tensor([len(sizes)]))
    case.__dict__["clusters"] = Clusters.from_assignment(*(t.to(backend.device) for t in of_cluster))
    if case.num_rows:
        check_members(case, *backend.ops.members(case.rows, *case.order))
        check_members(case, *PlainOps().members(case.rows, *case.order))


def test_members_of_rows_that_are_no_numbers(backend: Backend) -> None:
    """A finite distance is nearer than an infinite one, that nearer than none; all of a kind: the first."""
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[nan], [1.0], [2.0], [inf], [inf], [-inf], [0.0], [0.0], [0.0]], device=backend.device)
    order = torch.arange(9, device=backend.device)
    sizes = torch.tensor([3, 3, 3], device=backend.device)
    for member, energy in (
        f(rows, order, sizes.cumsum(0) - sizes, sizes) for f in (backend.ops.members, PlainOps().members)
    ):
        assert member.tolist() == [0, 3, 6]
        assert energy[0].isnan().all() and energy[2].tolist() == [0, 0]


# Combine, dots, spread.


def token_case(
    dtype: torch.dtype, device: str, tokens: int, slots: int, sources: int, features: int
) -> dict[str, Tensor]:
    case = Case([1], features, dtype, device)
    index = torch.randint(-1, sources, (tokens, slots), generator=case.generator).to(device)
    return {
        "source": case.floats(sources, features),
        "index": index,
        "weight": case.floats(tokens, slots).to(accumulator(dtype)),
        "row": case.floats(tokens, features),
        "centroid": case.floats(sources, features),
        "grad": case.floats(tokens, features),
        "sizes": torch.randint(1, 4, (sources,), generator=case.generator).to(device),
        "sum": case.floats(sources, features),
    }


SHAPES = [(1, 1, 1), (5, 2, 3), (33, 8, 40), (0, 2, 3), (4, 3, 9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_combine(backend: Backend, dtype: torch.dtype, features: int) -> None:
    backend.check_dtype(dtype)
    for tokens, slots, sources in SHAPES:
        t = token_case(dtype, backend.device, tokens, slots, sources, features)
        source, index, weight, row, centroid = (t[name] for name in ("source", "index", "weight", "row", "centroid"))
        for weights, add, minus in (
            (None, None, None),
            (weight, None, None),
            (None, row, None),
            (weight, row, centroid),
        ):
            got = backend.ops.combine(source, index, weights, add, minus)
            factor = torch.ones_like(weight) if weights is None else weights
            expected = plain_restored(source, index, add, minus) * factor.double()[..., None]
            assert_close(got, expected.sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_dots(backend: Backend, dtype: torch.dtype, features: int) -> None:
    backend.check_dtype(dtype)
    for tokens, slots, sources in SHAPES:
        t = token_case(dtype, backend.device, tokens, slots, sources, features)
        for row, centroid in ((None, None), (t["row"], t["centroid"])):
            got = backend.ops.dots(t["grad"], t["source"], t["index"], row, centroid)
            assert got.dtype == accumulator(dtype)
            expected = (plain_restored(t["source"], t["index"], row, centroid) * t["grad"].double()[:, None]).sum(-1)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_spread(backend: Backend, dtype: torch.dtype, features: int) -> None:
    backend.check_dtype(dtype)
    for tokens, slots, sources in SHAPES:
        t = token_case(dtype, backend.device, tokens, slots, sources, features)
        index, sizes = t["index"], t["sizes"]
        there = (index >= 0)[..., None]
        mean = (t["sum"].double() / sizes[:, None])[index.clamp(min=0)]
        around = t["grad"].double()[:, None] * t["weight"].double()[..., None] - mean
        around = around.masked_fill((sizes[index.clamp(min=0)] == 1)[..., None], 0)
        share = (t["source"].double() / sizes[:, None])[index.clamp(min=0)]
        for parts, expected in (
            ((t["grad"], t["weight"], t["sum"], None), around),
            ((None, None, None, t["source"]), share),
            ((t["grad"], t["weight"], t["sum"], t["source"]), around + share),
        ):
            assert_close(backend.ops.spread(*parts, index, sizes), (expected * there).sum(1))


def test_what_is_skipped_may_hold_anything(backend: Backend) -> None:
    source = torch.full((3, 8), float("nan"), device=backend.device)
    source[1] = 1.0
    index = torch.tensor([[-1, 1], [-1, -1]], device=backend.device)
    assert backend.ops.combine(source, index, None, None, None).tolist() == [[1.0] * 8, [0.0] * 8]
    grad = torch.ones(2, 8, device=backend.device)
    assert backend.ops.dots(grad, source, index, None, None).tolist() == [[0.0, 8.0], [0.0, 0.0]]


# Wire formats.


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_wire_formats(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """The same bytes as the codec in plain PyTorch, which is on the other end of the wire where kernels are not built."""
    format, codec = FORMATS.index(name), make_codec(name)
    for shape in [(0, 8), (1, 1), (5, 16), (3, 7), (4, 600)]:
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-8, 2, shape[1])
        rows = rows.to(backend.device, dtype)
        rows[3:4, :1], rows[2:3] = float("nan"), 0
        for seed in (None, 5):
            noise = None if seed is None else torch.Generator(backend.device).manual_seed(seed)
            up = None if seed is None else torch.rand(shape, generator=noise, device=backend.device)
            noise = None if noise is None else noise.manual_seed(seed)
            with reference_only():
                expected = codec.encode(rows, noise)
                decoded = codec.decode(expected, like=rows)
            payload = backend.ops.encode(rows, up, format)
            finite = rows.isfinite().all(1)  # the byte of a NaN is anybody's; its scale is NaN
            assert torch.equal(payload[finite], expected[finite])
            got = backend.ops.decode(expected, format, shape[1], dtype)
            torch.testing.assert_close(got, decoded, rtol=0, atol=0, equal_nan=True)
            assert backend.ops.decode(payload, format, shape[1], dtype)[~finite].isnan().all()


def test_every_fp8_number(backend: Backend) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    bytes = torch.cat([torch.arange(256, dtype=torch.uint8), torch.tensor([1.0]).view(torch.uint8)]).unsqueeze(0)
    got = backend.ops.decode(bytes.to(backend.device), 0, 256, torch.float32).cpu()
    torch.testing.assert_close(got[0], numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_the_same_every_time(backend: Backend, threads: int) -> None:
    case = Case([300, 130], 40, device=backend.device)
    t = token_case(torch.float32, backend.device, 100, 4, 50, 40)

    def run() -> list[Tensor]:
        key = backend.ops.hash(case.rows, None, case.row_ends, 5, 4)
        ends = (case.row_ends, case.cluster_ends)
        return [
            *backend.ops.plan(key, case.rows, None, *ends, case.num_clusters, 5, 4),
            *backend.ops.nearest(case.rows, None, case.rows[: case.num_clusters], *ends),
            backend.ops.segment(case.rows, None, None, *case.order, True),
            backend.ops.combine(t["source"], t["index"], t["weight"], t["row"], t["centroid"]),
            backend.ops.dots(t["grad"], t["source"], t["index"], t["row"], t["centroid"]),
        ]

    first, before = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        again = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_wrong_arguments_are_refused(backend: Backend) -> None:
    t = token_case(torch.float32, backend.device, 4, 2, 3, 8)
    for change in (
        {"index": t["index"].int()},
        {"weight": t["weight"][:1]},
        {"weight": t["weight"].double()},
        {"row": t["row"][:, :4]},
        {"row": None},
        {"source": t["source"].long()},
    ):
        a = {**t, **change}
        with pytest.raises(RuntimeError):
            backend.ops.combine(a["source"], a["index"], a["weight"], a["row"], a["centroid"])
