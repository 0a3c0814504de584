"""Dispatchers: every way to the experts and back gives the same mathematics (architecture.md, invariants 1, 2, 5, 7)."""

import dataclasses
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.exchange_plan import expert_order
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.registry import resolve_dispatcher
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import initialize_parameters, local
from megatron_lsh.parallel.testing import run_distributed_test

HIDDEN, EXPERTS, SEQUENCE, BATCH = 16, 8, 12, 2
#: Hashes so fine that random rows never collide: one row per cluster.
FINE = LSHConfig(lsh_clustering="bucket", lsh_num_hashes=6, lsh_hash_width=32)
#: The same by budget: as many clusters as rows.
FULL = LSHConfig(lsh_clustering="budget", lsh_target_rate=1.0)
COARSE = LSHConfig(lsh_clustering="bucket", lsh_num_hashes=1, lsh_hash_width=2)


def make_layer(ctx, dispatcher="alltoall", lsh=FINE, **moe):
    model_cfg = ModelConfig(num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=24, num_attention_heads=2, swiglu=True)
    moe_cfg = MoEConfig(
        num_experts=EXPERTS,
        moe_ffn_hidden_size=24,
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.01,
        moe_token_dispatcher_type=dispatcher,
        **moe,
    )
    telemetry = MoETelemetry(ctx.device)
    layer = MoELayer(model_cfg, moe_cfg, lsh, ctx, 3, telemetry)
    initialize_parameters(layer, 7)
    with torch.no_grad():  # the usual 0.02 would make every expert nearly zero
        for parameter in layer.parameters():
            local(parameter).mul_(20)
    return layer, telemetry


def single():
    return offline_context(device="cpu")


def tokens(rank, requires_grad=True):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).requires_grad_(requires_grad)


def run(layer, x, mask=None, memo=None):
    """Output, auxiliary loss, and gradients of the input and of every parameter (local shards)."""
    y, aux = layer(x, mask, memo)
    loss = y.pow(2).mean() + aux
    params = dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, [x, *params.values()])
    named = {name: local(grad) for name, grad in zip(params, grads[1:], strict=True)}
    return {"y": y.detach(), "aux": aux.detach(), "x": grads[0], **named}


def plain_loop(layer, x):
    """The definition of a MoE layer, one token at a time."""
    x_TD = x.flatten(0, 1)
    logits = x_TD @ local(layer.router.weight).T + local(layer.router.bias)
    fc1, fc2 = local(layer.experts.linear_fc1.weight), local(layer.experts.linear_fc2.weight)
    bias1 = getattr(layer.experts.linear_fc1, "bias", None)
    bias2 = getattr(layer.experts.linear_fc2, "bias", None)
    out = []
    for token in range(x_TD.shape[0]):
        top = logits[token].topk(2)
        y = 0
        for weight, expert in zip(top.values.softmax(0), top.indices.tolist(), strict=True):
            hidden = fc1[expert] @ x_TD[token] + (0 if bias1 is None else local(bias1)[expert])
            gate, up = hidden.chunk(2)
            y = y + weight * (fc2[expert] @ (F.silu(gate) * up) + (0 if bias2 is None else local(bias2)[expert]))
        out.append(y)
    return torch.stack(out).view_as(x)


def test_layer_is_the_plain_loop():
    layer, _ = make_layer(single())
    x = tokens(0)
    torch.testing.assert_close(layer(x)[0], plain_loop(layer, x), rtol=1e-4, atol=1e-5)


def ranks_agree_with_one(ep_sizes):
    for ep in ep_sizes:
        ctx = initialize(ParallelConfig(expert_model_parallel_size=ep))
        x = tokens(ctx.rank)
        reference = run(make_layer(single())[0], x)
        for dispatcher in ("alltoall", "allgather", "lsh"):
            layer, telemetry = make_layer(ctx, dispatcher)
            got = run(layer, x)
            for name, expected in reference.items():
                expected = expected.clone()
                value = got[name].clone()
                if name.startswith("experts."):
                    # Ours holds E/EP experts with the gradient of all tokens of the EP group.
                    dist.all_reduce(expected)
                    dist.all_reduce(value, group=ctx.edp.process_group)
                    expected = expected.chunk(ep)[ctx.ep.rank]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=f"ep {ep} {dispatcher} {name}")
            if dispatcher == "lsh" and ep > 1:
                check_one_row_per_cluster_is_exact(ctx, got, telemetry)
        if ep > 1:
            for residual, sent in product(("none", "identity", "lowrank", "interpolate"), ("mean", "member")):
                full = dataclasses.replace(FULL, lsh_residual=residual, lsh_representative=sent)
                layer, telemetry = make_layer(ctx, "lsh", full)
                check_one_row_per_cluster_is_exact(ctx, run(layer, x), telemetry)


def check_one_row_per_cluster_is_exact(ctx, got, telemetry):
    """Invariant 1: bit-equal to the plain all-to-all, in values and in every gradient."""
    exact = run(make_layer(ctx, "alltoall")[0], tokens(ctx.rank))
    for name, expected in exact.items():
        assert torch.equal(expected, got[name]), f"{name} differs by {(expected - got[name]).abs().max()}"
    (report,) = telemetry.collect(ctx, iterations=1)
    assert report["lsh_compression_rate"] == 1.0 and report["lsh_residual_energy"] < 1e-5
    assert report["alltoall_bytes"] == report["alltoall_bytes_uncompressed"] > 0


def test_every_dispatcher_on_1_2_and_4_ranks():
    run_distributed_test(ranks_agree_with_one, 4, (1, 2, 4))


def budgets_hold_with_every_option():
    """A fifth of the rows, at most one more per group, in every combination; bytes follow from the wire dtype."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    x = tokens(ctx.rank)
    bytes_per_row = {None: 64, "fp32": 64, "bf16": 32, "fp8": 20, "int8": 20, "int4": 12, "mxfp4": 9, "int4x32": 10}
    numbers = [(wire, None) for wire in bytes_per_row] + [("int4x32", "fp8"), (None, "int8")]
    for dispatcher in ("alltoall", "allgather", "lsh"):
        exact = run(make_layer(ctx, "alltoall")[0], x)["y"]
        for wire, backward in numbers:
            lsh = LSHConfig(lsh_wire_dtype=wire, lsh_wire_dtype_backward=backward, lsh_target_rate=0.5)
            layer, telemetry = make_layer(ctx, dispatcher, lsh)
            layer.set_iteration(3)
            got = run(layer, x)
            assert all(value.isfinite().all() for value in got.values())
            (report,) = telemetry.collect(ctx, iterations=1)
            if dispatcher == "lsh":
                groups = ctx.world.size * EXPERTS
                assert report["lsh_compression_rate"] <= 0.5 + groups / (SEQUENCE * BATCH * 2 * ctx.world.size)
            if dispatcher == "alltoall":
                both = bytes_per_row[wire] + bytes_per_row[backward or wire]
                assert report["alltoall_bytes"] * 128 == report["alltoall_bytes_uncompressed"] * both
                error = (got["y"] - exact).norm() / exact.norm()
                assert error < {None: 1e-6, "fp32": 1e-6, "bf16": 0.02, "fp8": 0.1, "int8": 0.03}.get(wire, 0.4)
            again, _ = make_layer(ctx, dispatcher, lsh)
            again.set_iteration(3)
            for name, value in run(again, x).items():
                assert torch.equal(value, got[name]), "stochastic rounding must be a function of the iteration"

    combinations = product(("none", "identity", "lowrank", "interpolate"), ("mean", "member"), (0, 1), (None, "int4"))
    for residual, sent, steps, wire in combinations:
        lsh = LSHConfig(
            lsh_target_rate=0.3,
            lsh_residual=residual,
            lsh_representative=sent,
            lsh_refine_steps=steps,
            lsh_wire_dtype=wire,
        )
        layer, telemetry = make_layer(ctx, "lsh", lsh)
        assert all(value.isfinite().all() for value in run(layer, x).values())
        (report,) = telemetry.collect(ctx, iterations=1)
        assert report["lsh_compression_rate"] <= 0.3 + EXPERTS / (SEQUENCE * BATCH * 2)


def compressed_ranks_agree_with_one(ep_sizes):
    for residual in ("identity", "interpolate"):
        expert_parallel_size_changes_nothing(dataclasses.replace(COARSE, lsh_residual=residual), ep_sizes)


def expert_parallel_size_changes_nothing(lsh, ep_sizes):
    """Clusters form on the source rank per expert."""
    results, reports = [], []
    for ep in (1, *ep_sizes):
        ctx = initialize(ParallelConfig(expert_model_parallel_size=ep))
        layer, telemetry = make_layer(ctx, "lsh", lsh)
        got = run(layer, tokens(ctx.rank))
        results.append([got[name] for name in ("y", "aux", "x", "router.weight")])
        reports.append(telemetry.collect(ctx, iterations=1)[0])
    for other in results[1:]:
        for expected, value in zip(results[0], other, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    rates = {report["lsh_compression_rate"] for report in reports}
    assert len(rates) == 1 and 0.1 < rates.pop() < 0.8
    assert reports[0]["alltoall_bytes"] == 0
    for report in reports[1:]:
        ratio = report["alltoall_bytes"] / report["alltoall_bytes_uncompressed"]
        assert 0.1 < ratio < 0.8


def degenerate_inputs():
    """Invariant 5: nothing hangs and nothing is NaN, whatever the routing."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    x = tokens(ctx.rank)
    equal = torch.ones_like(x, requires_grad=True)
    zero = torch.zeros_like(x, requires_grad=True)
    nobody = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    one = nobody.clone()
    one[0, 0] = True
    mine = nobody if ctx.rank == 0 else ~nobody
    for dispatcher in ("alltoall", "allgather", "lsh"):
        others = [LSHConfig(lsh_residual="lowrank", lsh_wire_dtype="int4")]
        others += [LSHConfig(lsh_residual="interpolate", lsh_representative=sent) for sent in ("mean", "member")]
        for lsh in (FINE, COARSE, LSHConfig(), *others):
            layer, _ = make_layer(ctx, dispatcher, lsh)
            for inputs, mask in ((x, nobody), (x, one), (x, mine), (equal, None), (zero, None)):
                got = run(layer, inputs, mask)
                assert all(value.isfinite().all() for value in got.values())
                if mask is not None:
                    assert (got["y"][~mask] == 0).all() and (got["x"][~mask] == 0).all()
            single_token = torch.randn(1, 1, HIDDEN, requires_grad=True)
            assert run(layer, single_token)["y"].shape == (1, 1, HIDDEN)
            capped, _ = make_layer(ctx, dispatcher, lsh, moe_expert_capacity_factor=0.5)
            assert all(value.isfinite().all() for value in run(capped, equal).values())


def test_compression_and_degenerate_inputs_on_2_ranks():
    run_distributed_test(both_on_two_ranks, 2)


def both_on_two_ranks():
    compressed_ranks_agree_with_one((2,))
    degenerate_inputs()
    budgets_hold_with_every_option()


@pytest.mark.parametrize("residual", ["identity", "none", "interpolate"])
def test_recomputation_replays_the_same_clusters(residual):
    """Invariant 7, and gauges are not counted twice."""
    lsh = LSHConfig(lsh_clustering="bucket", lsh_num_hashes=1, lsh_hash_width=4, lsh_residual=residual)
    x = tokens(0)
    results = []
    for recompute in (False, True):
        layer, telemetry = make_layer(single(), "lsh", lsh)
        hashed = count_calls(layer.dispatcher.alternatives["lsh"].path.compressor.cluster, "forward")
        memo = ReplayMemo()

        def forward(inputs, layer=layer, memo=memo):
            return layer(inputs, None, memo)

        y, aux = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        grads = torch.autograd.grad(y.pow(2).mean() + aux, [x, *layer.parameters()])
        assert len(hashed) == 1, "nothing may be hashed again"
        results.append(([y, aux, *grads], without_times(telemetry)))
    assert results[0][1] == results[1][1]
    for expected, value in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(expected, value)


def without_times(telemetry):
    (report,) = telemetry.collect(single(), iterations=1)
    return {name: value for name, value in report.figures.items() if not name.endswith("_time_ms")}


def count_calls(owner, name):
    calls, original = [], getattr(owner, name)
    setattr(owner, name, lambda *args: (calls.append(args), original(*args))[1])
    return calls


def test_warm_up_and_exact_context_run_uncompressed():
    x = tokens(0)
    exact = make_layer(single(), "alltoall")[0](x)[0]
    lsh = LSHConfig(lsh_clustering="bucket", lsh_num_hashes=1, lsh_hash_width=2, lsh_warmup_iters=3)
    layer, _ = make_layer(single(), "lsh", lsh)
    for iteration, compressed in ((0, False), (2, False), (3, True), (9, True)):
        layer.set_iteration(iteration)
        assert torch.equal(layer(x)[0], exact) != compressed
    with exact_dispatch(layer):
        assert torch.equal(layer(x)[0], exact)
    assert not torch.equal(layer(x)[0], exact)


def test_schedules():
    x = tokens(0)
    exact = make_layer(single(), "alltoall")[0](x)[0]
    layer, _ = make_layer(single(), "lsh", LSHConfig(lsh_warmup_iters=2, lsh_anneal_iters=3))
    ran_exact = []
    for iteration in range(10):
        layer.set_iteration(iteration, total=10)
        ran_exact.append(torch.equal(layer(x)[0], exact))
    assert ran_exact == [True, True, False, False, False, False, False, True, True, True]
    assert torch.equal(make_layer(single(), "lsh", LSHConfig(lsh_start_layer=4))[0](x)[0], exact)
    assert not torch.equal(make_layer(single(), "lsh", LSHConfig(lsh_start_layer=3))[0](x)[0], exact)


def test_probe_measures_the_restored_error():
    x = tokens(0)
    layer, telemetry = make_layer(single(), "lsh", LSHConfig(lsh_probe_interval=2))
    for iteration in range(2):
        layer.set_iteration(iteration)
        layer(x)
        (report,) = telemetry.collect(single(), iterations=1)
        assert (report["lsh_restored_error"] is not None) == (iteration == 0)
        if report["lsh_restored_error"] is not None:
            assert 0.0 < report["lsh_restored_error"] < 2.0


@pytest.mark.parametrize("dispatcher", ["alltoall", "lsh"])
def test_gradient_shortcut_adds_the_identity_to_the_gradient_only(dispatcher):
    """Each token's K rows carry weights that sum to one, so the token's gradient gains exactly the output's."""
    x = tokens(0)
    values, grads = [], []
    for shortcut in (False, True):
        layer, _ = make_layer(single(), dispatcher, LSHConfig(lsh_residual="none"), moe_gradient_shortcut=shortcut)
        y, _ = layer(x)
        g = torch.ones_like(y)
        values.append(y)
        grads.append(torch.autograd.grad(y, x, g)[0])
    assert torch.equal(*values)
    torch.testing.assert_close(grads[1] - grads[0], torch.ones_like(x), rtol=1e-4, atol=1e-4)


def test_hashes_are_the_same_in_every_instance_and_differ_between_layers():
    first, second = make_layer(single(), "lsh")[0], make_layer(single(), "lsh")[0]
    assert torch.equal(rotation(first), rotation(second))
    assert not [name for name in first.state_dict() if "rotation" in name], "a pure function of the seed is not saved"


def rotation(layer):
    return layer.dispatcher.alternatives["lsh"].path.compressor.cluster.rotation_DQW


def test_expert_order_matches_sorting():
    arriving = torch.tensor([[2, 0, 1], [0, 3, 1]])
    sort, unsort = expert_order(arriving, torch.device("cpu"))
    expert = torch.tensor([0, 0, 2, 1, 1, 1, 2])
    assert torch.equal(expert[sort], expert.sort(stable=True).values)
    assert torch.equal(sort[unsort], torch.arange(7))
    assert expert_order(arriving[:1], torch.device("cpu")) == (None, None)


def plug_in(spec):
    """A third party's dispatcher, named on the command line as module:factory."""
    return resolve_dispatcher("alltoall")(spec)


def test_registry():
    assert resolve_dispatcher(f"{__name__}:plug_in") is plug_in
    with pytest.raises(ConfigError, match="did you mean lsh"):
        resolve_dispatcher("lhs")
    with pytest.raises(ConfigError, match="importable"):
        resolve_dispatcher("no.such.module:factory")


def test_each_rank_layer_and_iteration_rounds_by_numbers_of_its_own():
    """Errors that are alike on all ranks would not average out in their gradient. A resumed run repeats its own."""
    model_cfg = ModelConfig(num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=24, num_attention_heads=2)
    moe_cfg, layout = (
        MoEConfig(num_experts=EXPERTS, moe_ffn_hidden_size=24),
        ParallelLayout.from_config(ParallelConfig(), 2),
    )

    def numbers(rank, number, iteration):
        ctx = offline_context(layout, rank, "cpu")
        layer = MoELayer(model_cfg, moe_cfg, FINE, ctx, number, MoETelemetry(ctx.device))
        layer.set_iteration(iteration)
        return torch.rand(8, generator=layer._noise.generator(ctx.device)).tolist()

    drawn = [numbers(*key) for key in ((0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 6))]
    assert len(set(map(tuple, drawn))) == 4 and numbers(1, 0, 5) == drawn[1]
