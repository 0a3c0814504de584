"""The MoE layer with and without kernels: outputs, every gradient, gauges; and which path is taken."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.ops import reference_only
from megatron_lsh.parallel.context import offline_context
from tests.kernels.test_not_finite import POISON, poisoned
from tests.kernels.test_usage import Recorder
from tests.moe.test_dispatchers import make_layer, run, single, tokens

pytestmark = pytest.mark.usefixtures("cpu_kernels")
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def budget(**settings) -> LSHConfig:
    """With the paper's residual, for which there are kernels from tokens to outputs."""
    return LSHConfig(**({"lsh_target_rate": 0.4, "lsh_residual": "identity"} | settings))


@pytest.mark.parametrize(
    ("lsh", "moe", "by_tokens"),
    [
        (budget(), {}, True),
        (budget(lsh_residual="none"), {}, True),
        (budget(lsh_residual="none", lsh_gradient="straight-through"), {}, True),
        (budget(lsh_refine_steps=0), {}, True),
        (budget(lsh_clustering="bucket", lsh_num_hashes=1, lsh_hash_width=2), {}, True),
        (budget(lsh_residual="lowrank", lsh_residual_rank=4), {}, False),
        (budget(lsh_residual="interpolate"), {}, False),
        (budget(lsh_residual="interpolate", lsh_representative="mean"), {}, False),
        (budget(), {"moe_gradient_shortcut": True}, True),
        (budget(), {"moe_expert_capacity_factor": 1.0}, True),
    ],
    ids=[
        "identity",
        "none",
        "straight-through",
        "unrefined",
        "bucket",
        "lowrank",
        "interpolate",
        "interpolate means",
        "shortcut",
        "capacity",
    ],
)
def test_layer_with_and_without_kernels(lsh: LSHConfig, moe: dict, by_tokens: bool) -> None:
    layer, telemetry = make_layer(single(), "lsh", lsh, **moe)
    mask = torch.rand(12, 2, generator=torch.Generator().manual_seed(1)) < 0.8
    with reference_only():
        expected = run(layer, tokens(0), mask)
    (plain,) = telemetry.collect(single(), iterations=1)
    with Recorder() as recorder:
        got = run(layer, tokens(0), mask)
    (ours,) = telemetry.collect(single(), iterations=1)
    assert ("segment_residual" in recorder.called or lsh.lsh_residual == "interpolate") == (not by_tokens)
    assert {"segment", "combine"} <= recorder.called
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert ours["lsh_compression_rate"] == plain["lsh_compression_rate"]
    assert ours["lsh_residual_energy"] == pytest.approx(plain["lsh_residual_energy"], rel=1e-4, abs=1e-6)


def test_recomputation_repeats_the_clusters() -> None:
    layer, _ = make_layer(single(), "lsh", budget())
    memo, x = ReplayMemo(), tokens(0)
    first = layer(x, None, memo)[0]
    with Recorder() as recorder:
        again = layer(x, None, memo)[0]
    assert torch.equal(first, again)
    assert not recorder.called & {"hash", "plan", "nearest", "regroup"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("residual", ["interpolate", "identity", "none"])
@pytest.mark.parametrize("form", ["member", "mean"])
def test_the_layer_is_that_in_fp64(residual: str, form: str, device: str) -> None:
    """In fp32, against fp64 on the CPU. Of tokens in threes: of two rows either is the nearest to their mean."""
    lsh = budget(lsh_residual=residual, lsh_representative=form, lsh_target_rate=0.3333)
    generator = torch.Generator().manual_seed(2)
    threes = torch.randn(8, 1, 16, generator=generator) + 0.05 * torch.randn(8, 3, 16, generator=generator)
    found = []
    for place, dtype in (("cpu", torch.float64), (device, torch.float32)):
        layer, _ = make_layer(offline_context(device=place), "lsh", lsh)
        x = threes.view(12, 2, 16).to(place, dtype, copy=True).requires_grad_()
        y, aux = layer.to(dtype)(x)
        (y.pow(2).mean() + aux).backward()
        assert x.grad is not None
        found.append((y.detach().cpu().double(), x.grad.cpu().double()))
    for ours, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cases", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_tokens_that_are_not_finite_crash_nothing_and_have_the_step_skipped(cases: int) -> None:
    """Some output or gradient is not finite either, which is what a step is skipped for."""
    layer, _ = make_layer(single(), "lsh", LSHConfig(lsh_target_rate=0.4))
    generator = torch.Generator().manual_seed(0)
    for case in range(cases):
        x = poisoned((24, 16), generator)
        x[case % 24, case % 16] = POISON[case % len(POISON)]
        x = x.view(12, 2, 16).requires_grad_()
        with reference_only() if case % 4 == 0 else nullcontext():
            y, aux = layer(x)
            (y.pow(2).mean() + aux).backward()
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        assert not all(found.isfinite().all() for found in (y, *gradients) if found is not None)
        layer.zero_grad()
