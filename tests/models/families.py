"""Small BERTs and T5s for the tests of this folder, and what is checked of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lsh.config import BertConfig, Config, T5Config
from megatron_lsh.families import BERT, T5, Mean
from megatron_lsh.models.bert import BertModel
from megatron_lsh.models.model import Model
from megatron_lsh.models.t5 import T5Model
from megatron_lsh.moe.telemetry import LayerReport, MoETelemetry
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.data_parallel import finalize_gradients, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.random import seed_everything
from tests.models.model_helpers import VOCAB, fill, full_gradients

#: Padding (False) at the end of the second of two rows.
REAL = torch.arange(16)[None, :] < torch.tensor([[16], [11]])
Batch = dict[str, Tensor]


def bert_config(**settings: Any) -> BertConfig:
    return fill(BertConfig(), **settings)


def t5_config(**settings: Any) -> T5Config:
    """Three decoder layers beside two encoder layers, and a shorter output than input."""
    small = {"encoder_num_layers": 2, "decoder_num_layers": 3, "encoder_seq_length": 16, "decoder_seq_length": 12}
    return fill(T5Config(), **{**small, **settings})


def make_bert(cfg: BertConfig, ctx: ParallelContext | None = None) -> Model:
    ctx = ctx or offline_context(device="cpu")
    return BERT.build(cfg, VOCAB, ctx, telemetry_of(cfg, ctx))


def make_t5(cfg: T5Config, ctx: ParallelContext | None = None) -> Model:
    ctx = ctx or offline_context(device="cpu")
    return T5.build(cfg, VOCAB, ctx, telemetry_of(cfg, ctx))


def telemetry_of(cfg: Config, ctx: ParallelContext) -> MoETelemetry:
    return MoETelemetry(ctx.device)


def bert_batch(seed: int = 0, padding: int = 0, real: Tensor = REAL) -> Batch:
    """Random tokens and labels where `real` says, with `padding` more positions behind."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(VOCAB, real.shape, generator=generator) for _ in range(2))
    types = (torch.arange(real.shape[1]) >= real.shape[1] // 2).long().expand(real.shape)
    whole = {"tokens": tokens, "token_types": types, "padding_mask": real, "labels": labels}
    return {name: nn.functional.pad(tensor, (0, padding)) for name, tensor in whole.items()}


def t5_batch(seed: int = 0, padding: int = 0, real: Tensor = REAL) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder, labels = (torch.randint(VOCAB, real.shape, generator=generator) for _ in range(3))
    batch = {"encoder_tokens": encoder, "decoder_tokens": decoder[:, :12], "labels": labels[:, :12]}
    batch |= {"encoder_padding_mask": real, "decoder_padding_mask": real.roll(-3, 1)[:, :12] & real[:, :12]}
    return {name: nn.functional.pad(tensor, (0, padding)) for name, tensor in batch.items()}


def bert_loss(model: BertModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(mean over the real tokens and the rows, auxiliary loss)."""
    loss_BS, order_B2, aux_loss = model(  # type: ignore[misc]
        batch["tokens"], batch["token_types"], batch["padding_mask"], batch["labels"]
    )
    loss = Mean.of(loss_BS, batch["padding_mask"]).value
    if order_B2 is not None:
        rows_B = batch["padding_mask"][:, 0]
        wrong_B = nn.functional.cross_entropy(order_B2.float(), batch["labels"][:, 0] % 2, reduction="none")
        loss = loss + Mean.of(wrong_B, rows_B).value
    return loss, aux_loss


def t5_loss(model: T5Model, batch: Batch) -> tuple[Tensor, Tensor]:
    loss_BS, aux_loss = model(
        batch["encoder_tokens"], batch["decoder_tokens"], batch["encoder_padding_mask"],
        batch["decoder_padding_mask"], batch["labels"],
    )  # fmt: skip
    return Mean.of(loss_BS, batch["decoder_padding_mask"]).value, aux_loss


@dataclass(frozen=True)
class Family:
    """What the checks below need to know of a model."""

    config: Callable[..., Any]
    make: Callable[..., Any]
    batch: Callable[..., Batch]
    loss: Callable[..., tuple[Tensor, Tensor]]


def bert() -> Family:
    return Family(bert_config, make_bert, bert_batch, bert_loss)


def t5() -> Family:
    return Family(t5_config, make_t5, t5_batch, t5_loss)


@dataclass(frozen=True)
class Result:
    """What a forward and a backward pass leave behind."""

    loss: Tensor
    aux_loss: Tensor
    gradients: dict[str, Tensor]
    reports: list[LayerReport]


def forward_backward(family: Family, model: Any, batches: list[Batch]) -> Result:
    """Mean over micro-batches, as the train loop computes them."""
    total, aux_total = torch.zeros(()), torch.zeros(())
    for batch in batches:
        loss, aux_loss = family.loss(model, batch)
        ((loss + aux_loss) / len(batches)).backward()
        total += loss.detach() / len(batches)
        aux_total += aux_loss.detach() / len(batches)
    finalize_gradients(model, model.ctx)
    return Result(total, aux_total, full_gradients(model), model.telemetry.collect(model.ctx, 1))


# --- what is checked of both -------------------------------------------------------------------------------------------


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Gradients are equal up to rounding; one that is nothing but rounding is not looked at closely."""
    assert set(actual) == set(expected)
    floor = 1e-4 * torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        error = (actual[name] - grad).norm() / (grad.norm() + floor)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def check_padding_changes_nothing(family: Family, settings: dict[str, Any]) -> None:
    """With 8 more positions of padding: loss, gradients, auxiliary loss, load, rates and energies are the same."""
    plain, padded = (
        forward_backward(
            family, family.make(family.config(**settings, max_position_embeddings=24)), [family.batch(padding=padding)]
        )
        for padding in (0, 8)
    )
    torch.testing.assert_close(padded.loss, plain.loss)
    torch.testing.assert_close(padded.aux_loss, plain.aux_loss)
    assert_same(padded.gradients, plain.gradients)
    compressed = settings.get("moe_token_dispatcher_type") == "lsh"
    for a, b in zip(padded.reports, plain.reports, strict=True):
        for name in ("load_p50", "load_p95", "load_max_over_mean"):
            assert a[name] == b[name]
        assert a["load_p50"] > 0 and (a["lsh_compression_rate"] is not None) == compressed
        assert a["lsh_compression_rate"] == b["lsh_compression_rate"]
        for name in ("load_balancing_loss", "z_loss", "lsh_residual_energy"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def check_all_padding(family: Family, settings: dict[str, Any]) -> None:
    """A micro-batch without a token: no loss, no NaN, and a gradient of zeros for every parameter."""
    model = family.make(family.config(**settings))
    result = forward_backward(family, model, [family.batch(real=torch.zeros(2, 16, dtype=torch.bool))])
    assert result.loss == 0 and result.aux_loss == 0
    assert all((grad == 0).all() for grad in result.gradients.values())
    assert all(report["load_p95"] == 0 for report in result.reports)


def check_recomputation(family: Family, settings: dict[str, Any]) -> None:
    """Recomputation changes no bit."""
    plans: tuple[dict[str, Any], ...] = (
        {},
        {"recompute_granularity": "full", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe", "mlp", "layernorm"]},
    )
    results = []
    for plan in plans:
        model = family.make(family.config(**settings, **plan, attention_dropout=0.1, hidden_dropout=0.1))
        torch.manual_seed(3)
        results.append(forward_backward(family, model, [family.batch()]))
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert all(torch.equal(result.gradients[name], grad) for name, grad in results[0].gradients.items())
        assert [r["load_p50"] for r in result.reports] == [r["load_p50"] for r in results[0].reports]


def connect(cfg: Config, **parallel: Any) -> ParallelContext:
    cfg.parallel.device = "cpu"
    for name, value in parallel.items():
        setattr(cfg.parallel, name, value)
    ctx = initialize(cfg.parallel, moe=cfg.moe.num_experts is not None)
    seed_everything(1, ctx)
    return ctx


def check_two_ranks(family: Family, settings: dict[str, Any]) -> None:
    """Runs on two ranks: TP 2 and EP 2 compute what one rank computes, also when one rank has nothing but padding.

    The one rank dispatches exactly whatever the settings say, so LSH must be given a target rate of 1.
    """
    cfg = family.config(**{**settings, "moe_token_dispatcher_type": "alltoall"})
    nothing = family.batch(real=torch.zeros(2, 16, dtype=torch.bool))
    layouts: list[tuple[dict[str, Any], list[Batch]]] = [
        ({"tensor_model_parallel_size": 2}, [family.batch()]),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, [family.batch()]),
        ({"expert_model_parallel_size": 2}, [family.batch(), family.batch(seed=1)]),
        ({"expert_model_parallel_size": 2, "use_distributed_optimizer": True}, [family.batch(), nothing]),
    ]
    for parallel, batches in layouts:
        expected = forward_backward(family, family.make(cfg), batches)
        layout = family.config(**settings)
        model = family.make(layout, connect(layout, **parallel))
        shard_model(model, model.ctx, layout.precision)
        own = batches if model.ctx.tp.size == 2 else [batches[model.ctx.dp.rank]]
        result = forward_backward(family, model, own)
        # The loss is the same on tensor-parallel ranks, which hold parts of the auxiliary loss.
        losses = torch.stack([result.loss / model.ctx.tp.size, result.aux_loss])
        torch.distributed.all_reduce(losses)
        wanted = torch.stack([expected.loss, expected.aux_loss])
        torch.testing.assert_close(losses / model.ctx.dp.size, wanted, rtol=2e-6, atol=0)
        assert_same(result.gradients, expected.gradients)
        for a, b in zip(result.reports, expected.reports, strict=True):
            assert math.isclose(a["load_p95"], b["load_p95"]) and a["load_p95"] > 0
        if len(batches) == 2 and settings.get("moe_token_dispatcher_type") == "lsh":
            assert all(report["lsh_compression_rate"] == 1 for report in result.reports)


def check_sharded_recomputation(family: Family, settings: dict[str, Any]) -> None:
    """Runs on two ranks: recomputing whole layers under ``fully_shard`` changes no bit."""
    results = []
    for plan in ({}, {"recompute_granularity": "full", "recompute_num_layers": 2}):
        cfg = family.config(**settings, **plan)
        model = family.make(cfg, connect(cfg, expert_model_parallel_size=2, use_distributed_optimizer=True))
        shard_model(model, model.ctx, cfg.precision)
        results.append(forward_backward(family, model, [family.batch(), family.batch(seed=1)]))
    assert torch.equal(results[1].loss, results[0].loss)
    assert all(torch.equal(results[1].gradients[name], grad) for name, grad in results[0].gradients.items())
