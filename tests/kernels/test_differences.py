"""Restoration by differences: every kernel against its definition, and all of them together against fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_lsh.lsh.solve import half_inverse
from megatron_lsh.ops import PlainOps, library
from tests.kernels.conftest import Backend

PLAIN = PlainOps()
#: Clusters of each block, and its places.
SHAPES = [([3, 1, 7], 8), ([15, 2], 16), ([40], 48), ([1], 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Inputs:
    """Rows around their clusters' representatives, and what follows from them, by the definitions in fp64."""

    widths: list[int]
    places: int
    features: int
    dtype: torch.dtype

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.widths) + self.features)
        count, rows_each = sum(self.widths), 5
        representatives = torch.randn(count, self.features, generator=generator).to(self.dtype)
        cluster = torch.arange(count).repeat_interleave(rows_each)
        rows = representatives[cluster] + 0.3 * torch.randn(len(cluster), self.features, generator=generator)
        moves = torch.rand(len(cluster), generator=generator) < 0.8
        rows = torch.where(moves.unsqueeze(1), rows, representatives[cluster].float()).to(self.dtype)
        widths = torch.tensor(self.widths)
        starts = widths.cumsum(0) - widths
        block = torch.arange(len(widths)).repeat_interleave(widths)
        slot = block * self.places + torch.arange(count) - starts[block]
        points = PLAIN.place(representatives, starts, widths, None, self.places)
        products = points.double() @ points.double().transpose(1, 2)
        scale, among, system = PLAIN.fit(products, widths, 0.01, 1.0)
        offset, square = PLAIN.differences(rows, None, cluster, representatives)
        around = (points[block[cluster]].double() @ offset.double().unsqueeze(2)).squeeze(2)
        grad = torch.randn(around.shape, generator=generator)
        return {
            "rows": rows, "representatives": representatives, "cluster": cluster, "moves": moves, "widths": widths,
            "starts": starts, "slot": slot[cluster], "products": products.float(), "scale": scale.float(),
            "among": among.float(), "system": system.float(), "offset": offset, "square": square.float(),
            "around": around.to(self.dtype), "grad": grad.to(self.dtype),
        }  # fmt: skip


def check(backend: Backend, name: str, *arguments: object) -> None:
    """The kernel against the definition on the same numbers, which are widened to fp64 for it."""
    there = [x.to(backend.device) if isinstance(x, Tensor) else x for x in arguments]
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    limit = max(LIMITS[x.dtype] for x in arguments if isinstance(x, Tensor) and x.is_floating_point())
    got, want = getattr(backend.ops, name)(*there), getattr(PLAIN, name)(*wide)
    for ours, exact in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        assert ours.shape == exact.shape
        torch.testing.assert_close(
            ours.cpu().double(), exact.double(), rtol=limit, atol=limit, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [5, 16, 264])
@pytest.mark.parametrize(("widths", "places"), SHAPES)
def test_rows_and_places(on_gpu: Backend, widths: list[int], places: int, features: int, dtype: torch.dtype) -> None:
    i = Inputs(widths, places, features, dtype).make()
    order = torch.randperm(len(i["rows"]), generator=torch.Generator().manual_seed(0))
    mean = i["representatives"][: len(widths)].contiguous()
    for places_of in (None, order):
        check(on_gpu, "differences", i["rows"], places_of, i["cluster"], i["representatives"])
        check(on_gpu, "less", i["rows"], i["square"], i["offset"], places_of)
    for less in (None, mean):
        check(on_gpu, "place", i["representatives"], i["starts"], i["widths"], less, places)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("widths", "places"), [*SHAPES, ([5, 4], 7)])
def test_weights_of_rows(on_gpu: Backend, widths: list[int], places: int, dtype: torch.dtype) -> None:
    i = Inputs(widths, places, 16, dtype).make()
    of = (i["around"], i["square"], i["slot"], i["moves"], i["among"], i["scale"])
    check(on_gpu, "fit", i["products"], i["widths"], 0.01, 1.5)
    check(on_gpu, "changes_backward", i["grad"], *of)
    count = sum(widths)
    sums = [torch.randn(count, places).to(dtype) for _ in range(2)]
    by_inverse = torch.randn(len(widths), places, places).to(dtype)
    check(on_gpu, "pairs", *sums, by_inverse, i["among"], i["scale"], i["starts"], i["widths"])
    # Numbers in two parts: their sum is what counts.
    inverse_GBB = torch.linalg.inv(i["system"].double())
    changes = on_gpu.ops.changes(*(x.to(on_gpu.device) for x in of)).cpu().double()
    wide = PLAIN.changes(*(x.double() if x.is_floating_point() else x for x in of))
    high, again, low = changes.chunk(3, 1)
    assert torch.equal(high, again)
    torch.testing.assert_close(high + low, wide.chunk(3, 1)[0], rtol=1e-4, atol=1e-5)
    given = (inverse_GBB.float().to(on_gpu.device), i["widths"].to(on_gpu.device), dtype)
    for ours, exact, parts in zip(
        on_gpu.ops.split(*given), PLAIN.split(inverse_GBB, i["widths"], torch.float64), (3, 2), strict=True
    ):
        pieces = ours.cpu().double().chunk(parts, 1)
        torch.testing.assert_close(pieces[0] + pieces[1], exact.chunk(parts, 1)[0], rtol=1e-4, atol=1e-3)
        assert parts == 2 or torch.equal(pieces[0], pieces[2])


def kernel_matrices(groups: int, size: int) -> Tensor:
    points = torch.randn(groups, size, 9, generator=torch.Generator().manual_seed(size)).double()
    distances = (points.unsqueeze(1) - points.unsqueeze(2)).square().sum(3)
    return torch.exp(-distances / distances.mean().clamp(min=1)) + 0.01 * torch.eye(size)


@pytest.mark.parametrize("size", [1, 5, 16, 17, 104, 128])
def test_half_of_an_inverse(on_gpu: Backend, size: int) -> None:
    """As exact as the library's in fp32, within a factor, at the condition that ridge allows."""
    system = kernel_matrices(3, size)
    exact, library = PLAIN.half_inverse(system), PLAIN.half_inverse(system.float())
    ours = on_gpu.ops.half_inverse(system.float().to(on_gpu.device)).cpu()
    assert torch.equal(ours, ours.tril())
    assert (ours - exact).norm() <= 4 * (library - exact).norm() + 1e-6 * exact.norm()
    with pytest.raises(RuntimeError, match="at most 128"):
        on_gpu.ops.half_inverse(torch.eye(129, device=on_gpu.device).unsqueeze(0))


class Claimed(Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


def test_fp64_is_left_to_the_library(on_gpu: Backend) -> None:
    """As are tensors on a CPU. What a GPU has in fp32 goes to the kernel."""
    ops, system = on_gpu.functions, kernel_matrices(2, 7)
    exact = PLAIN.half_inverse(system)
    for claimed, most in (
        (system.as_subclass(Claimed), 7),
        (system.float(), 7),
        (system.float().as_subclass(Claimed), 128),
    ):
        assert ops.most_half(claimed) == most
        if on_gpu.device == "cpu":  # where the emulator's kernels run
            found = ops.half_inverse(claimed).as_subclass(Tensor)
            assert found.dtype == claimed.dtype
            torch.testing.assert_close(found, exact.to(found.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [130, 417])
def test_wide_matrices_are_taken_by_halves(size: int) -> None:
    class UpTo128(PlainOps):
        def most_half(self, matrices: Tensor) -> int:
            return 128

    system = kernel_matrices(2, size)
    exact = PLAIN.half_inverse(system)
    assert (half_inverse(system, UpTo128()) - exact).norm() <= 1e-10 * exact.norm()
    halves, library = (half_inverse(system.float(), ops).double() for ops in (UpTo128(), PLAIN))
    assert (halves - exact).norm() <= 3 * (library - exact).norm()
    inverse = exact.mT @ exact
    assert (halves.mT @ halves - inverse).norm() <= 3 * (library.mT @ library - inverse).norm()


@pytest.mark.parametrize("name", library.ON_GPUS)
def test_opcheck(on_gpu: Backend, name: str) -> None:
    """Schema, fake kernel, and agreement with AOTAutograd under dynamic shapes."""
    i = {key: x.to(on_gpu.device) for key, x in Inputs([3, 1, 7], 8, 16, torch.bfloat16).make().items()}
    of = (i["around"], i["square"], i["slot"], i["moves"], i["among"], i["scale"])
    sums, by_inverse = torch.ones(11, 8, device=on_gpu.device).bfloat16(), torch.ones_like(i["among"]).bfloat16()
    calls = {
        "differences": (i["rows"], None, i["cluster"], i["representatives"]),
        "place": (i["representatives"], i["starts"], i["widths"], None, 8),
        "fit": (i["products"], i["widths"], 0.01, 1.0),
        "half_inverse": (i["system"],),
        "split": (i["system"], i["widths"], torch.bfloat16),
        "changes": of,
        "changes_backward": (i["grad"], *of),
        "pairs": (sums, sums, by_inverse, i["among"], i["scale"], i["starts"], i["widths"]),
        "less": (i["rows"], i["square"], i["offset"], None),
    }
    torch.library.opcheck(getattr(on_gpu.ops, name).default, calls[name])
