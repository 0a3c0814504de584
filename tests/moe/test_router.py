"""Router: weights, selection, balancing, replay, and equality on split tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.permute import permute, unpermute
from megatron_lsh.moe.router import Routing, TopKRouter, balanced_ids, top_ids, update_expert_biases
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import initialize_parameters
from megatron_lsh.parallel.testing import run_distributed_test

T, D, E = 16, 12, 6
CPU = offline_context(device="cpu")


def make_router(ctx: ParallelContext = CPU, bias: bool = True, **moe: Any) -> TopKRouter:
    settings: dict[str, Any] = {"num_experts": E, "moe_router_load_balancing_type": "none"} | moe
    model = ModelConfig(hidden_size=D, init_method_std=1.0, add_bias_linear=bias)
    router = TopKRouter(model, MoEConfig(**settings), ctx)
    initialize_parameters(router, seed=3)
    return router


def tokens(count: int = T, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_logits(router: TopKRouter, x_TD: Tensor) -> Tensor:
    """In the precision of `x_TD`."""
    logits_TE = x_TD @ router.weight.to(x_TD.dtype).T
    return logits_TE if router.bias is None else logits_TE + router.bias.to(x_TD.dtype)


def expected_weights(logits: list[float], topk: int, kind: str, pre: bool, scale: float) -> tuple[list[int], Tensor]:
    """One token, from the definitions."""
    values = torch.tensor(logits, dtype=torch.float64)
    ids = sorted(range(len(logits)), key=lambda e: -logits[e])[:topk]
    if kind == "sigmoid":
        s = 1 / (1 + torch.exp(-values[ids]))
        weights = s / s.sum() if topk > 1 else s
    elif pre:
        weights = torch.exp(values[ids]) / torch.exp(values).sum()
    else:
        weights = torch.exp(values[ids]) / torch.exp(values[ids]).sum()
    return ids, weights * scale


@pytest.mark.parametrize("topk", [1, 2, 6])
@pytest.mark.parametrize(("kind", "pre"), [("softmax", False), ("softmax", True), ("sigmoid", False)])
@pytest.mark.parametrize("scale", [None, 2.5])
def test_weights(topk: int, kind: str, pre: bool, scale: float | None) -> None:
    router = make_router(
        moe_router_topk=topk,
        moe_router_score_function=kind,
        moe_router_pre_softmax=pre,
        moe_router_topk_scaling_factor=scale,
    )
    x = tokens()
    routing = router(x)
    logits = plain_logits(router, x.double()).tolist()
    for t in range(T):
        ids, weights = expected_weights(logits[t], topk, kind, pre, scale or 1.0)
        assert routing.expert_ids_TK[t].tolist() == ids
        torch.testing.assert_close(routing.probs_TK[t].double(), weights, rtol=1e-5, atol=1e-7)
    assert routing.probs_TK.dtype == torch.float32 and routing.expert_ids_TK.dtype == torch.int64
    assert routing.tokens_per_expert_E.tolist() == routing.expert_ids_TK.flatten().bincount(minlength=E).tolist()
    assert routing.num_rows() == T * topk and routing.complete
    assert float(routing.aux_loss) == float(routing.load_balancing_loss) == float(routing.z_loss) == 0


def test_equals_transformers() -> None:
    """Mixtral renormalises over the chosen experts; Qwen3-MoE without norm_topk_prob does not."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    common = {"hidden_size": D, "num_experts_per_tok": 2}
    mixtral = MixtralTopKRouter(transformers.MixtralConfig(num_local_experts=E, **common))
    qwen = Qwen3MoeTopKRouter(transformers.Qwen3MoeConfig(num_experts=E, norm_topk_prob=False, **common))
    for theirs, pre in ((mixtral, False), (qwen, True)):
        ours = make_router(bias=False, moe_router_pre_softmax=pre)
        with torch.no_grad():
            theirs.weight.copy_(ours.weight)
        _, weights, ids = theirs(tokens())
        routing = ours(tokens())
        assert torch.equal(routing.expert_ids_TK, ids)
        torch.testing.assert_close(routing.probs_TK, weights, rtol=1e-5, atol=1e-6)


def test_arithmetic_is_wide_under_bf16() -> None:
    for dtype in ("fp32", "fp64"):
        router = make_router(moe_router_dtype=dtype, moe_z_loss_coeff=1e-3, moe_router_load_balancing_type="aux_loss")
        x = tokens(dtype=torch.bfloat16).requires_grad_()
        router.to(torch.bfloat16)
        routing = router(x)
        logits = plain_logits(router, x.double())
        top = logits.topk(2)
        assert torch.equal(routing.expert_ids_TK, top.indices)
        torch.testing.assert_close(routing.probs_TK, top.values.softmax(-1).float(), rtol=1e-5, atol=1e-6)
        assert routing.probs_TK.dtype == routing.aux_loss.dtype == torch.float32
        (routing.probs_TK.square().sum() + routing.aux_loss).backward()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16
        assert router.weight.grad is not None and router.weight.grad.dtype == torch.bfloat16
        assert router.bias is not None and router.bias.grad is not None and router.bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "score", "pre"),
    [
        ("aux_loss", "softmax", False),
        ("aux_loss", "softmax", True),
        ("seq_aux_loss", "sigmoid", False),
        ("global_aux_loss", "softmax", False),
    ],
)
def test_gradcheck(kind: str, score: str, pre: bool) -> None:
    router = make_router(
        moe_router_load_balancing_type=kind,
        moe_router_score_function=score,
        moe_router_pre_softmax=pre,
        moe_aux_loss_coeff=0.5,
        moe_z_loss_coeff=0.1,
    ).double()
    mask = torch.arange(8) != 3

    def losses(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        router.discard_counts()
        routing = torch.func.functional_call(router, {"weight": weight, "bias": bias}, (x, mask, 2))
        return routing.probs_TK, routing.aux_loss

    x = tokens(8, dtype=torch.float64).requires_grad_()
    assert router.bias is not None
    weights = (router.weight.detach().requires_grad_(), router.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(losses, (x, *weights))


def test_aux_loss_is_scaled_and_reported() -> None:
    router = make_router(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_z_loss_coeff=0.001)
    routing = router(tokens())
    logits = plain_logits(router, tokens())
    fraction = routing.tokens_per_expert_E / (2 * T)
    balance, z = E * (fraction * logits.softmax(-1).mean(0)).sum(), logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(routing.load_balancing_loss, balance.detach())
    torch.testing.assert_close(routing.z_loss, z.detach())
    torch.testing.assert_close(routing.aux_loss, 0.01 * balance + 0.001 * z)
    assert routing.aux_loss.requires_grad and not routing.load_balancing_loss.requires_grad
    router.eval()
    assert float(router(tokens()).aux_loss) == 0


def test_ties_go_to_the_lowest_id() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [float("nan"), 1.0, 2.0, 0.0]])
    assert top_ids(scores, 2).tolist() == [[1, 2], [0, 1], [0, 2]]
    router = make_router(bias=False, moe_router_topk=3)
    assert router(torch.zeros(4, D)).expert_ids_TK.tolist() == [[0, 1, 2]] * 4


def test_masked_tokens() -> None:
    router = make_router(
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1, moe_router_topk=3
    )
    mask = torch.arange(T) % 3 != 0
    x = tokens().requires_grad_()
    masked, plain = router(x, mask), router(x[mask])
    assert (masked.expert_ids_TK[~mask] == -1).all() and not masked.probs_TK[~mask].any()
    assert torch.equal(masked.expert_ids_TK[mask], plain.expert_ids_TK)
    torch.testing.assert_close(masked.aux_loss, plain.aux_loss)
    assert torch.equal(masked.tokens_per_expert_E, plain.tokens_per_expert_E)
    assert masked.num_rows() == int(mask.sum()) * 3 and not masked.complete
    (grad,) = torch.autograd.grad(masked.aux_loss + masked.probs_TK.square().sum(), x)
    assert not grad[~mask].any() and grad[mask].all()


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity(policy: str) -> None:
    router = make_router(moe_expert_capacity_factor=0.5, moe_token_drop_policy=policy)
    free = make_router()(tokens())
    routing = router(tokens())
    capacity = 3  # ceil(16 * 2 / 6 * 0.5)
    assert routing.tokens_per_expert_E.tolist() == free.tokens_per_expert_E.clamp(max=capacity).tolist()
    kept = routing.expert_ids_TK >= 0
    assert torch.equal(routing.expert_ids_TK[kept], free.expert_ids_TK[kept])
    assert torch.equal(routing.probs_TK, free.probs_TK * kept)
    assert routing.num_rows() == int(kept.sum()) < T * 2


def test_expert_bias_moves_towards_balance() -> None:
    router = make_router(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.25
    )
    assert router.expert_bias is not None and "expert_bias" in router.state_dict()
    before = router(tokens())
    router(tokens(seed=1))  # a second micro-batch of the same step
    with torch.no_grad():
        router(tokens(seed=2))  # no step learns from this
    router.eval()(tokens(seed=3))
    router.train()
    load = (
        before.tokens_per_expert_E
        + make_router(moe_router_score_function="sigmoid")(tokens(seed=1)).tokens_per_expert_E
    )
    router.update_bias(CPU)
    expected = 0.25 * torch.sign(load.float().mean() - load)
    assert torch.equal(router.expert_bias, expected) and expected.unique().numel() > 1

    after = router(tokens())
    logits = plain_logits(router, tokens())
    s = torch.sigmoid(logits)
    assert torch.equal(after.expert_ids_TK, (s + expected).topk(2).indices)  # the bias selects ...
    chosen = s.gather(1, after.expert_ids_TK)
    torch.testing.assert_close(after.probs_TK, chosen / chosen.sum(-1, keepdim=True))  # ... and does not weigh
    assert not torch.equal(after.expert_ids_TK, before.expert_ids_TK)

    router.discard_counts()  # the step was skipped
    router.update_bias(CPU)
    assert torch.equal(router.expert_bias, expected)


def test_expert_bias_ends_imbalance() -> None:
    router = make_router(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.02
    )
    x = tokens(512) + 0.7  # a common direction prefers some experts

    def imbalance() -> float:
        counts = router(x).tokens_per_expert_E.float()
        return float(counts.max() / counts.mean())

    start = imbalance()
    for _ in range(60):
        router(x)
        router.update_bias(CPU)
    assert start > 1.5 and imbalance() < 1.2


def test_loss_with_bias_judges_the_choice_without() -> None:
    moe: dict[str, Any] = {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1.0,
        "moe_router_score_function": "sigmoid",
    }
    plain, biased = make_router(**moe), make_router(moe_router_enable_expert_bias=True, **moe)
    assert biased.expert_bias is not None
    biased.expert_bias += torch.linspace(-1, 1, E)
    a, b = plain(tokens()), biased(tokens())
    assert not torch.equal(a.expert_ids_TK, b.expert_ids_TK)
    assert torch.equal(a.aux_loss, b.aux_loss)


def test_forced_balance() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, topk, masked in ((60, 2, 0), (7, 3, 0), (64, 6, 10), (0, 2, 0)):
        mask = torch.arange(count) >= masked
        ids = balanced_ids(torch.rand(count + E, generator=generator), count, topk, E, mask)
        assert all(len(set(row)) == topk for row in ids.tolist())
        counts = ids[mask].flatten().bincount(minlength=E)
        assert counts.max() - counts.min() <= topk
    router = make_router(moe_router_force_load_balancing=True, moe_z_loss_coeff=0.1)
    x = tokens(60)
    first, second = router(x), router(x)
    assert first.tokens_per_expert_E.tolist() == [20] * E
    assert not torch.equal(first.expert_ids_TK, second.expert_ids_TK)
    logits = plain_logits(router, x).gather(1, first.expert_ids_TK)
    torch.testing.assert_close(first.probs_TK, logits.softmax(-1))  # the router's own weights for those experts
    first.probs_TK.square().sum().backward()
    assert router.weight.grad is not None and router.weight.grad.any()


def test_jitter_only_in_training() -> None:
    router, plain = make_router(moe_input_jitter_eps=0.1), make_router()
    x = tokens()
    noisy = [router(x).probs_TK for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(router.eval()(x).probs_TK, plain(x).probs_TK)
    logits = torch.ones(1000, D) @ torch.ones(1, D).T
    wide = TopKRouter(
        ModelConfig(hidden_size=D, add_bias_linear=False),
        MoEConfig(num_experts=1, moe_router_topk=1, moe_input_jitter_eps=0.1),
        CPU,
    )
    torch.nn.init.ones_(wide.weight)
    ratio = wide._logits(torch.ones(1000, D)) / logits
    assert 0.9 < ratio.min() < 0.99 and 1.01 < ratio.max() < 1.1


@pytest.mark.parametrize("forced", [False, True])
def test_recomputation_repeats_everything_and_counts_once(forced: bool) -> None:
    moe: dict[str, Any] = {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 0.1,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_input_jitter_eps": 0.2,
        "moe_router_force_load_balancing": forced,
        "moe_expert_capacity_factor": 0.75,
    }

    def run(recompute: bool) -> tuple[Tensor, Tensor, list[int], list[int]]:
        router, memo = make_router(**moe), ReplayMemo()
        x = tokens().requires_grad_()

        def layer(x: Tensor) -> Tensor:
            routing: Routing = router(x, memo=memo)
            dropout = torch.rand_like(x)  # must see the same generator state in the replay
            rows, _, permutation = permute(x, routing.expert_ids_TK, E)
            return (unpermute(rows.sin(), routing.probs_TK, permutation) * dropout).sum() + routing.aux_loss

        torch.manual_seed(5)
        loss = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        loss.backward()
        assert x.grad is not None and router.weight.grad is not None
        return x.grad, router.weight.grad, router._step_counts_E.tolist(), router._global_counts_E.tolist()

    plain, replayed = run(recompute=False), run(recompute=True)
    assert torch.equal(plain[0], replayed[0]) and torch.equal(plain[1], replayed[1])
    assert plain[2:] == replayed[2:] and sum(plain[2]) == T * 2


class NoHostSync(TorchDispatchMode):
    """Raises on operations whose result the host must read from a GPU."""

    SYNC = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in self.SYNC or (name == "index" and any(a.dtype == torch.bool for a in args[1] if a is not None)):
            raise AssertionError(f"{name} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    router = make_router(
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.1,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_input_jitter_eps=0.2,
        moe_expert_capacity_factor=0.75,
    )
    x = tokens().requires_grad_()
    with NoHostSync():
        routing = router(x, torch.arange(T) > 2, batch_size=4)
        rows, _, permutation = permute(x, routing.expert_ids_TK, E)
        y = unpermute(rows, routing.probs_TK, permutation)
        (y.square().sum() + routing.aux_loss).backward()
        update_expert_biases([router], CPU)
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
        x.sum().item()


def test_user_errors() -> None:
    with pytest.raises(ConfigError, match=r"moe_router_topk \(7\).*num_experts \(6\)"):
        make_router(moe_router_topk=7)
    with pytest.raises(ConfigError, match="sigmoid"):
        make_router(moe_router_enable_expert_bias=True)
    with pytest.raises(ConfigError, match="num-experts"):
        make_router(num_experts=None)


# --- several ranks -------------------------------------------------------------------------------------------------


def _routed(router: TopKRouter, x: Tensor, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(total loss, gradient of x, load-balancing + z-loss reports) of one micro-batch."""
    x = x.clone().requires_grad_()
    routing = router(x, mask, batch)
    y = (routing.probs_TK * (routing.expert_ids_TK + 1)).sum() / 100
    (routing.aux_loss + y).backward()
    assert x.grad is not None
    return (routing.aux_loss + y).detach(), x.grad, torch.stack([routing.load_balancing_loss, routing.z_loss])


def _weight_grad(router: TopKRouter) -> Tensor:
    """Of the weight, and in the last column of the bias."""
    columns = []
    for parameter in (router.weight, router.bias):
        assert parameter is not None and parameter.grad is not None
        grad = parameter.grad
        full = grad.full_tensor() if isinstance(grad, torch.distributed.tensor.DTensor) else grad
        columns.append(full.view(E, -1))
    return torch.cat(columns, 1)


def _bias(router: TopKRouter) -> Tensor:
    assert router.expert_bias is not None
    return router.expert_bias


def _check_splits(kinds: list[str]) -> None:
    """Two ranks share the tokens of a micro-batch (TP), or hold micro-batches of their own (DP): same mathematics."""
    batch, length = 2, 8
    x = tokens(length * batch, seed=4)
    mask = torch.ones(length, batch, dtype=torch.bool)
    mask[5:, 0] = False
    mask[7:, 1] = False
    moe: dict[str, Any] = {
        "moe_aux_loss_coeff": 0.3,
        "moe_z_loss_coeff": 0.2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    tp = initialize(ParallelConfig(tensor_model_parallel_size=2, device="cpu"))
    dp = initialize(ParallelConfig(device="cpu"))
    half = slice(tp.rank * length, (tp.rank + 1) * length)  # T / 2 tokens: the first or second half of the sequence
    for kind in kinds:
        for token_mask in (None, mask.flatten()):
            whole = make_router(moe_router_load_balancing_type=kind, **moe)
            loss, grad, reports = _routed(whole, x, token_mask, batch)

            split = make_router(tp, moe_router_load_balancing_type=kind, **moe)
            part = _routed(split, x[half], None if token_mask is None else token_mask[half], batch)
            sums = torch.stack([part[0], *part[2]])
            torch.distributed.all_reduce(sums)
            torch.testing.assert_close(sums, torch.stack([loss, *reports]))
            torch.testing.assert_close(part[1], grad[half])
            torch.testing.assert_close(_weight_grad(split), _weight_grad(whole))

            split.update_bias(tp)
            whole.update_bias(CPU)
            assert torch.equal(_bias(split), _bias(whole)) and _bias(whole).any()
    _check_data_parallel(dp, x, mask.flatten(), moe)


def _check_data_parallel(dp: ParallelContext, x: Tensor, mask: Tensor, moe: dict[str, Any]) -> None:
    """global_aux_loss: the mean over data-parallel ranks is the loss of the joint batch, over two micro-batches each."""
    moe = moe | {"moe_router_load_balancing_type": "global_aux_loss", "moe_z_loss_coeff": None}
    alone, shared = make_router(**moe), make_router(dp, **moe)
    half = slice(dp.rank * 8, (dp.rank + 1) * 8)
    for seed, token_mask in ((4, None), (5, mask)):
        x = tokens(16, seed=seed)
        routing = alone(x, token_mask, 2)
        part = shared(x[half], None if token_mask is None else token_mask[half], 2)
        for r in (routing, part):
            r.aux_loss.backward()
        mean = torch.stack([part.aux_loss.detach(), part.load_balancing_loss])
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean / 2, torch.stack([routing.aux_loss.detach(), routing.load_balancing_loss]))
    grad = _weight_grad(shared).clone()
    torch.distributed.all_reduce(grad)
    torch.testing.assert_close(grad / 2, _weight_grad(alone))
    shared.update_bias(dp)
    alone.update_bias(CPU)
    assert torch.equal(_bias(shared), _bias(alone)) and _bias(alone).any()
    assert not shared._global_counts_E.any()


def test_split_tokens_equal_whole_ones() -> None:
    run_distributed_test(_check_splits, 2, ["aux_loss", "seq_aux_loss", "global_aux_loss", "none"])


def test_tensor_parallel_layout_without_ranks() -> None:
    """A dry run builds every module without process groups."""
    router = make_router(offline_context(ParallelLayout(4, tp=2, ep=4), device="meta"))
    assert router.weight.shape == (E, D) and router.weight.is_meta


def test_a_router_has_a_bias_where_linear_layers_have() -> None:
    """As in megatron-core 0.15 and later, which draws it like the weight."""
    router = make_router()
    assert router.bias is not None and router.bias.shape == (E,) and 0.2 < router.bias.std() < 3
    assert {name for name, _ in make_router(bias=False).named_parameters()} == {"weight"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_routes_as_cpu() -> None:
    moe: dict[str, Any] = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    cpu = make_router(**moe)
    gpu = make_router(offline_context(device="cuda"), **moe)
    x = tokens(512)
    a, b = cpu(x), gpu(x.cuda())
    assert torch.equal(a.expert_ids_TK, b.expert_ids_TK.cpu())
    torch.testing.assert_close(a.probs_TK, b.probs_TK.cpu())
    torch.testing.assert_close(a.aux_loss, b.aux_loss.cpu())
