"""The MoE layer with and without kernels: outputs, every gradient, gauges; and which path is taken."""

from __future__ import annotations

import pytest
import torch

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.ops import reference_only
from megatron_lsh.parallel.context import offline_context
from tests.kernels.test_usage import Recorder
from tests.moe.test_dispatchers import make_layer, run, single, tokens

pytestmark = pytest.mark.usefixtures("cpu_kernels")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("residual", ["interpolate", "identity", "none"])
@pytest.mark.parametrize("form", ["member", "mean"])
def test_layer_on_a_gpu_is_that_of_the_cpu(residual: str, form: str) -> None:
    """In fp32 against fp64 on the CPU."""
    lsh = budget(lsh_residual=residual, lsh_representative=form)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        layer, _ = make_layer(offline_context(device=device), "lsh", lsh)
        x = tokens(0).detach().to(device, dtype).requires_grad_()
        y, aux = layer.to(dtype)(x)
        (y.pow(2).mean() + aux).backward()
        assert x.grad is not None
        found.append((y.detach().cpu().double(), x.grad.cpu().double()))
    for ours, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4)
