"""Experts against plain feed-forward networks, in every mode and with uneven and empty inputs."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe import experts as experts_module
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.permute import permute, unpermute
from megatron_lsh.moe.router import TopKRouter
from megatron_lsh.ops.groups import why_not_grouped
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.parallel.testing import run_distributed_test

D, F, E = 8, 16, 4
CPU = offline_context(device="cpu")
ACTIVATIONS: dict[str, dict[str, Any]] = {"gelu": {}, "openai_gelu": {"openai_gelu": True}, "swiglu": {"swiglu": True}}


def make_experts(
    ctx: ParallelContext = CPU, gemm: str | None = None, hidden: int = D, width: int = F, **model: Any
) -> Experts:
    model_cfg = ModelConfig(num_layers=2, hidden_size=hidden, ffn_hidden_size=width, init_method_std=0.3, **model)
    experts = Experts(model_cfg, MoEConfig(num_experts=E), ctx, gemm=gemm)
    initialize_parameters(experts, seed=1)
    generator = torch.Generator().manual_seed(2)
    for linear in (experts.linear_fc1, experts.linear_fc2):
        if linear.bias is not None and not linear.bias.is_meta:
            linear.bias.data.copy_(torch.randn(linear.bias.shape, generator=generator))
    return experts


def plain(experts: Experts, rows: Tensor, counts: list[int], activation: str) -> Tensor:
    """Row by row, from the formulas."""
    w1, b1, w2, b2 = (
        experts.linear_fc1.weight,
        experts.linear_fc1.bias,
        experts.linear_fc2.weight,
        experts.linear_fc2.bias,
    )
    outputs = []
    expert_of_row = [e for e, n in enumerate(counts) for _ in range(n)]
    for x, e in zip(rows, expert_of_row, strict=True):
        h = w1[e] @ x + (b1[e] if b1 is not None else 0)
        if activation == "swiglu":
            h = h[:F] * torch.sigmoid(h[:F]) * h[F:]
        elif activation == "gelu":
            h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        else:
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        outputs.append(w2[e] @ h + (b2[e] if b2 is not None else 0))
    return torch.stack(outputs)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding. grouped_mm has no bias, so there the sum is rounded once more."""
    tolerance = 5e-2 if a.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))


def gradients(experts: Experts, y: Tensor, rows: Tensor) -> list[Tensor]:
    parameters = list(experts.parameters())
    return list(torch.autograd.grad(y.square().sum(), [rows, *parameters]))


@pytest.mark.parametrize("gemm", ["loop", "grouped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_equals_formulas(gemm: str, bias: bool, activation: str) -> None:
    experts = make_experts(gemm=gemm, add_bias_linear=bias, **ACTIVATIONS[activation])
    assert len(list(experts.parameters())) == (4 if bias else 2)
    counts = [3, 0, 5, 1]
    rows = torch.randn(9, D, requires_grad=True)
    expected = plain(experts, rows, counts, activation)
    expected_gradients = gradients(experts, expected, rows)
    for given in (counts, torch.tensor(counts)):
        y = experts(Feed(rows, given))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(experts, y, rows), expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_equals_loop(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    loop = make_experts(gemm="loop", hidden=64, width=96, swiglu=True, add_bias_linear=bias).to(dtype)
    grouped = make_experts(gemm="grouped", hidden=64, width=96, swiglu=True, add_bias_linear=bias).to(dtype)
    for counts in ([40, 0, 17, 7], [0, 0, 64, 0], [64, 0, 0, 0], [0, 0, 0, 64]):
        rows = torch.randn(64, 64).to(dtype).requires_grad_()
        a, b = loop(Feed(rows, counts)), grouped(Feed(rows, counts))
        assert_same(a, b)
        for x, y in zip(gradients(loop, a, rows), gradients(grouped, b, rows), strict=True):
            assert_same(x, y)


def test_grouped_takes_expanded_gradients() -> None:
    """sum() hands back a gradient of stride 0, which grouped_mm alone refuses."""
    experts = make_experts(gemm="grouped", swiglu=True)
    rows = torch.randn(8, D, requires_grad=True)
    experts(Feed(rows, [2, 2, 2, 2])).sum().backward()
    assert rows.grad is not None and rows.grad.any()


@pytest.mark.parametrize("gemm", [None, "loop", "grouped"])
def test_no_rows(gemm: str | None) -> None:
    """Every parameter still gets a (zero) gradient: hooks and collectives of the backward pass must run."""
    experts = make_experts(gemm=gemm, swiglu=True)
    rows = torch.zeros(0, D, requires_grad=True)
    y = experts(Feed(rows, torch.zeros(E, dtype=torch.int64)))
    assert y.shape == (0, D) and y.requires_grad
    y.sum().backward()
    for p in (rows, *experts.parameters()):
        assert p.grad is not None and not p.grad.any()


def test_experts_fed_in_pieces_are_those_fed_at_once() -> None:
    """One call, pieces that arrive one after the other; each one's outputs set out before the next piece is touched."""
    experts, counts, order = make_experts(swiglu=True), [3, 0, 2, 1], []
    rows = torch.randn(6, D, requires_grad=True)
    whole = experts(Feed(rows, counts))
    first, second = rows[:3], rows[3:]

    def arrive(name: str, piece: Tensor) -> Tensor:
        order.append(f"{name} arrives")
        return piece

    def leave(name: str, y: Tensor) -> Tensor:
        order.append(f"{name} leaves")
        return y

    pieces = experts(
        *(
            Feed(piece, part, which, partial(arrive, name), partial(leave, name))
            for name, piece, part, which in (
                ("first", first, counts[:2], range(2)),
                ("second", second, counts[2:], range(2, 4)),
            )
        )
    )
    assert order == ["first arrives", "first leaves", "second arrives", "second leaves"]
    assert torch.equal(torch.cat(pieces), whole)
    for ours, theirs in zip(gradients(experts, torch.cat(pieces), rows), gradients(experts, whole, rows), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("activation", "bias"), itertools.product(ACTIVATIONS, [False, True]))
def test_gradcheck(activation: str, bias: bool) -> None:
    experts = make_experts(hidden=3, width=5, add_bias_linear=bias, **ACTIVATIONS[activation]).double()
    names, values = zip(*experts.named_parameters(), strict=True)
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(rows: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(experts, dict(zip(names, values, strict=True)), (Feed(rows, [2, 0, 1, 2]),))

    assert torch.autograd.gradcheck(run, (rows, *(v.detach().requires_grad_() for v in values)))


def test_equals_mixtral() -> None:
    """Router, permutation and experts together give Hugging Face's Mixtral block."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.0
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    model_cfg = ModelConfig(num_layers=1, hidden_size=D, init_method_std=0.5, swiglu=True, add_bias_linear=False)
    moe_cfg = MoEConfig(num_experts=E, moe_ffn_hidden_size=F)
    router, experts = TopKRouter(model_cfg, moe_cfg, CPU), Experts(model_cfg, moe_cfg, CPU)
    for module in (router, experts):
        initialize_parameters(module, seed=7)
    with torch.no_grad():
        theirs.gate.weight.copy_(router.weight)
        theirs.experts.gate_up_proj.copy_(experts.linear_fc1.weight)
        theirs.experts.down_proj.copy_(experts.linear_fc2.weight)
    x = torch.randn(2, 10, D)
    routing = router(x.flatten(0, 1))
    rows, counts, permutation = permute(x.flatten(0, 1), routing.expert_ids_TK, E, routing.num_rows())
    ours = unpermute(experts(Feed(rows, counts)), routing.probs_TK, permutation)
    torch.testing.assert_close(ours, theirs(x).flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_initial_values() -> None:
    ctx = offline_context(device="cpu")
    model_cfg = ModelConfig(num_layers=8, hidden_size=64, ffn_hidden_size=128, init_method_std=0.02)
    experts = Experts(model_cfg, MoEConfig(num_experts=E), ctx)
    initialize_parameters(experts, seed=0)
    assert experts.linear_fc1.bias is not None and not experts.linear_fc1.bias.any()
    torch.testing.assert_close(experts.linear_fc1.weight.std().item(), 0.02, rtol=0.02, atol=0)
    torch.testing.assert_close(experts.linear_fc2.weight.std().item(), 0.02 / 16**0.5, rtol=0.02, atol=0)


def test_expert_parallel_slices() -> None:
    whole = make_experts()
    parts = [make_experts(offline_context(ParallelLayout(2, ep=2), rank=rank, device="cpu")) for rank in range(2)]
    for name in ("linear_fc1.weight", "linear_fc2.weight"):
        joined = torch.cat([part.get_parameter(name) for part in parts])
        assert torch.equal(joined, whole.get_parameter(name))
    assert whole.linear_fc1.weight.shape == (E, F, D) and whole.linear_fc2.weight.shape == (E, D, F)
    assert make_experts(swiglu=True).linear_fc1.weight.shape == (E, 2 * F, D)


def test_errors() -> None:
    experts = make_experts()
    with pytest.raises(ValueError, match="3 counts for 4 local experts"):
        experts(Feed(torch.zeros(3, D), [1, 1, 1]))
    with pytest.raises(ValueError, match="counts sum to 4, but there are 3 rows"):
        experts(Feed(torch.zeros(3, D), [1, 1, 1, 1]))
    with pytest.raises(ValueError, match="gemm 'magic'"):
        make_experts(gemm="magic")
    with pytest.raises(ConfigError, match="--moe-ffn-hidden-size"):
        Experts(ModelConfig(hidden_size=D), MoEConfig(num_experts=E), CPU)


def test_fallback_says_why_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    experts_module._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="megatron_lsh.moe.experts"):
        for _ in range(2):
            make_experts()(Feed(torch.randn(4, D), [1, 1, 1, 1]))
    assert len(caplog.records) == 1 and "no kernel for cpu" in caplog.text

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_grouped(torch.bfloat16, gpu, (64, 8)) is None
    assert "float32" in (why_not_grouped(torch.float32, gpu, (64, 8)) or "")
    assert "multiples of 8" in (why_not_grouped(torch.bfloat16, gpu, (64, 12)) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "old card" in (why_not_grouped(torch.bfloat16, gpu, (64, 8)) or "")


def _one_rank_without_rows() -> None:
    """Both ranks hold all experts (expert-data parallel 2); rank 1 receives nothing, and still takes part."""
    ctx = initialize(ParallelConfig(device="cpu"))
    assert ctx.expert_mesh is not None
    counts = [3, 0, 2, 1] if ctx.rank == 0 else [0, 0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, D, generator=generator)[: sum(counts)].requires_grad_()
    sharded = make_experts(ctx, swiglu=True)
    fully_shard(sharded, mesh=ctx.expert_mesh["edp_replicate", "edp_shard"])
    sharded(Feed(rows, counts)).square().sum().backward()

    alone = make_experts(swiglu=True)
    all_rows = torch.randn(6, D, generator=generator.manual_seed(0))
    alone(Feed(all_rows, [3, 0, 2, 1])).square().sum().backward()
    for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        grad = ours.grad.full_tensor()  # type: ignore[attr-defined]
        torch.testing.assert_close(grad * 2, theirs.grad)  # fully_shard averages over the two ranks


def test_a_rank_without_rows_takes_part_in_fully_shard() -> None:
    run_distributed_test(_one_rank_without_rows, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_gpu_default_equals_loop(dtype: torch.dtype, bias: bool) -> None:
    ctx = offline_context(device="cuda")
    kwargs: dict[str, Any] = {"hidden": 128, "width": 256, "swiglu": True, "add_bias_linear": bias}
    default, loop = make_experts(ctx, **kwargs).to(dtype), make_experts(ctx, gemm="loop", **kwargs).to(dtype)
    for counts in ([100, 0, 27, 1], [0, 0, 128, 0]):
        rows = torch.randn(sum(counts), 128, device="cuda", dtype=dtype, requires_grad=True)
        a, b = default(Feed(rows, torch.tensor(counts))), loop(Feed(rows, counts))
        assert_same(a, b)
        for x, y in zip(gradients(default, a, rows), gradients(loop, b, rows), strict=True):
            assert_same(x, y)
