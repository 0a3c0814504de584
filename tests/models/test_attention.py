"""Self-attention on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lsh.config import validate
from megatron_lsh.errors import ConfigError
from megatron_lsh.models.attention import SelfAttention, core_attention, document_attention_mask
from megatron_lsh.models.recompute import RecomputePlan
from megatron_lsh.models.rotary import rotary_embedding
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import initialize_parameters
from tests.models.model_helpers import make_config, randomize


def nothing(x: Tensor) -> Tensor:
    """In place of a norm."""
    return x


def make_attention(**settings: object) -> SelfAttention:
    attention = SelfAttention(make_config(**settings).model, offline_context(device="cpu"), RecomputePlan())
    initialize_parameters(attention, seed=0)
    randomize(attention)
    return attention


def naive_attention(q_SBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor, allowed_SS: Tensor) -> Tensor:
    scores = torch.einsum("sbhd,tbhd->bhst", q_SBHd, k_SBHd) / q_SBHd.shape[-1] ** 0.5
    probs = scores.masked_fill(~allowed_SS, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", probs, v_SBHd).flatten(2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_core_attention_is_the_formula(causal: bool, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 4, 8).unbind()
    mask = torch.rand(2, 1, 6, 6) > 0.4
    mask |= torch.eye(6, dtype=torch.bool)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed) & (mask if masked else True)
    out = core_attention(
        q, k, v, offline_context(device="cpu"), causal=causal, mask=mask if masked else None, dropout=0.0
    )
    torch.testing.assert_close(out, naive_attention(q, k, v, allowed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 4])
def test_fewer_queries_than_keys_are_the_last_ones_on_a_gpu(dtype: torch.dtype, groups: int) -> None:
    """Kernels align a triangle that is not square at one corner or the other."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(64, 2, 4, 64), torch.randn(2, 192, 2, groups, 64)
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        queries, keys, values = inputs = [x.to(device, kind).requires_grad_() for x in (q, k, v)]
        ctx = offline_context(device=device)
        out = core_attention(queries, keys, values, ctx, causal=True, mask=None, dropout=0.0)
        found.append((out, *torch.autograd.grad(out.float().sin().sum(), inputs)))
    for expected, actual in zip(*found, strict=True):
        error = (actual.cpu().float() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("masked", [True, False])
def test_fewer_queries_than_keys_are_the_last_ones(masked: bool) -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(6, 2, 4, 8), torch.randn(2, 6, 2, 2, 8)
    mask = torch.rand(2, 1, 6, 6) > 0.4
    mask |= torch.eye(6, dtype=torch.bool)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() & (mask if masked else True)
    rows = mask[..., 4:, :] if masked else None
    out = core_attention(q[4:], k, v, offline_context(device="cpu"), causal=True, mask=rows, dropout=0.0)
    every = naive_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), allowed)
    torch.testing.assert_close(out, every[4:])


def test_a_query_that_sees_nothing_yields_zeros() -> None:
    q, k, v = torch.randn(3, 4, 1, 2, 8, requires_grad=True).unbind()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2, :] = False
    out = core_attention(q, k, v, offline_context(device="cpu"), causal=False, mask=mask, dropout=0.0)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_bias_is_added_to_the_scores(causal: bool, masked: bool) -> None:
    """The first query may attend to nothing where there is a mask: zeros, and finite gradients."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 4, 8, requires_grad=True).unbind()
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[..., 0] = not masked
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed) & (mask if masked else True)
    out = core_attention(
        q, k, v, offline_context(device="cpu"), causal=causal, mask=mask if masked else None, dropout=0.0, bias=bias
    )
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) / 8**0.5 + bias
    probs = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
    torch.testing.assert_close(out, torch.einsum("bhst,tbhd->sbhd", probs, v).flatten(2))
    assert (out[0] == 0).all() == (causal and masked)
    out.square().sum().backward()
    assert bias.grad is not None and torch.isfinite(bias.grad).all() and bias.grad.abs().sum() > 0


def test_grouped_queries_equal_repeated_heads() -> None:
    """Two key/value heads serving four query heads are four heads with each key/value head written twice."""
    grouped = make_attention(group_query_attention=True, num_query_groups=2)
    full = make_attention()
    with torch.no_grad():
        for name in ("weight", "bias"):
            source = getattr(grouped.linear_qkv, name).unflatten(0, (2, 4, 8))  # group, (q, q, k, v), channel
            heads = [torch.cat((source[g, q : q + 1], source[g, 2:])) for g in range(2) for q in range(2)]
            getattr(full.linear_qkv, name).copy_(torch.stack(heads).flatten(0, 2))
    full.linear_proj.load_state_dict(grouped.linear_proj.state_dict())
    x = torch.randn(10, 2, 32)
    rotary = rotary_embedding(torch.arange(10), 8)
    torch.testing.assert_close(grouped.after(nothing, x, rotary=rotary), full.after(nothing, x, rotary=rotary))


def test_causality() -> None:
    attention = make_attention(qk_layernorm=True)
    x = torch.randn(8, 1, 32)
    changed = x.clone()
    changed[5] += 1
    before, after = attention.after(nothing, x), attention.after(nothing, changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])
    assert not torch.equal(
        attention.after(nothing, x, causal=False)[0], attention.after(nothing, changed, causal=False)[0]
    )


def test_query_and_key_norms_work_per_head() -> None:
    """With qk-layernorm, scaling the queries and keys before the norm changes nothing."""
    attention = make_attention(qk_layernorm=True, normalization="RMSNorm", add_bias_linear=False)
    assert attention.q_layernorm.weight.shape == attention.k_layernorm.weight.shape == (8,)
    x = torch.randn(8, 1, 32)
    before = attention.after(nothing, x)
    with torch.no_grad():
        attention.linear_qkv.weight.unflatten(0, (4, 3, 8))[:, :2] *= 50
    torch.testing.assert_close(attention.after(nothing, x), before, rtol=1e-3, atol=1e-3)


def test_query_and_key_norms_over_all_heads() -> None:
    """With full width, scaling all heads changes nothing; scaling one does."""
    attention = make_attention(
        qk_layernorm=True, qk_layernorm_width="full", normalization="RMSNorm", add_bias_linear=False
    )
    assert attention.q_layernorm.weight.shape == attention.k_layernorm.weight.shape == (32,)
    x = torch.randn(8, 1, 32)
    q = torch.randn(8, 1, 4, 8)
    expected = torch.nn.functional.rms_norm(q.flatten(2), (32,), attention.q_layernorm.weight, eps=1e-5).view_as(q)
    torch.testing.assert_close(attention.q_layernorm(q), expected)
    before = attention.after(nothing, x)
    with torch.no_grad():
        packed = attention.linear_qkv.weight.unflatten(0, (4, 3, 8))
        packed[:, :2] *= 50
        torch.testing.assert_close(attention.after(nothing, x), before, rtol=1e-3, atol=1e-3)
        packed[0, 0] *= 50
    assert (attention.after(nothing, x) - before).abs().max() > 1e-2
    with pytest.raises(ConfigError, match=r"model.qk_layernorm_width \(full\) must be head with model.normalization"):
        make_attention(qk_layernorm=True, qk_layernorm_width="full")
    with pytest.raises(ConfigError, match=r"qk_layernorm_width \(full\) must be head with .*\(LayerNorm\)"):
        validate(make_config(qk_layernorm=True, qk_layernorm_width="full"), 1)


def test_document_mask_separates_documents() -> None:
    """Two documents packed into one sequence are attended as if each were alone."""
    mask = document_attention_mask(*[torch.tensor([[0, 0, 0, 1, 1, 1]])] * 2)
    assert mask.shape == (1, 1, 6, 6)
    attention = make_attention()
    x = torch.randn(6, 1, 32)
    packed = attention.after(
        nothing, x, attention_mask=mask, rotary=rotary_embedding(torch.tensor([0, 1, 2, 0, 1, 2]), 8)
    )
    rotary = rotary_embedding(torch.arange(3), 8)
    alone = torch.cat((attention.after(nothing, x[:3], rotary=rotary), attention.after(nothing, x[3:], rotary=rotary)))
    torch.testing.assert_close(packed, alone)


def test_heads_must_fit_the_ranks() -> None:
    ctx = offline_context(ParallelLayout(4, tp=4))
    cfg = make_config(group_query_attention=True, num_query_groups=2)
    with pytest.raises(ConfigError, match=r"model.num_query_groups \(2\) must be divisible"):
        SelfAttention(cfg.model, ctx, RecomputePlan())
