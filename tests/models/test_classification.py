"""Classifiers on top of each backbone: names of parameters, pooling, padding, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_lsh.config.classification import BertClassificationConfig, ClassificationConfig, T5ClassificationConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.families import FAMILIES, Family, family_of
from megatron_lsh.models.classification import HEAD, GPTScorer, pool
from megatron_lsh.models.model import Model
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import is_expert
from megatron_lsh.parallel.testing import run_distributed_test
from tests.models.model_helpers import MOE, VOCAB, fill, full_gradients, make_gpt, randomize

CLASSES = {"gpt": ClassificationConfig, "bert": BertClassificationConfig, "t5": T5ClassificationConfig}
COMPARED = (HEAD, "pooler.", "embedding.", "decoder.layers.0.self", "encoder.layers.0.self")
POOLING = {"gpt": "last", "bert": "first", "t5": "mean"}


def config_of(backbone: str, **settings: Any) -> ClassificationConfig:
    """Two layers of width 32 with experts in the second, S = 16; `settings` are fields of any part."""
    positions = "relative" if backbone == "t5" else "learned_absolute"
    own = {"position_embedding_type": positions, "pooling": POOLING[backbone], "classifier_dropout": 0.0}
    return fill(CLASSES[backbone](), **MOE, **{**own, "classes": ["a", "b", "c"], **settings})


def build(cfg: ClassificationConfig, ctx: ParallelContext | None = None) -> Model:
    """A classifier with three classes."""
    ctx = ctx or offline_context(device="cpu")
    return family_of(cfg).build(cfg, VOCAB, ctx, MoETelemetry(ctx.device))


def batch_of(lengths: list[int], width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, token types and padding mask of texts of these lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (len(lengths), 16), generator=generator)[:, :width]
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    types = (torch.arange(width)[None, :] > 3).long().expand(len(lengths), width)
    return tokens.masked_fill(~mask, 0), types.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("backbone", CLASSES)
@pytest.mark.parametrize("plain", [False, True])
def test_the_backbone_is_that_of_pretraining(backbone: str, plain: bool) -> None:
    """Same names, shapes and initial values; what differs is what the two lists name. Experts are really there."""
    cfg = config_of(backbone, untie_embeddings_and_output_weights=plain)
    if isinstance(cfg, BertClassificationConfig):
        cfg.bert.bert_binary_head = not plain
    ours, theirs = dict(build(cfg).named_parameters()), dict(pretraining_model(cfg).named_parameters())
    fresh, unused = family_of(cfg).fresh_parameters(cfg), family_of(cfg).unused_parameters
    added, left = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    assert added == {name for name in ours if name.startswith(fresh)} and {HEAD + "weight", HEAD + "bias"} <= added
    assert ("pooler.dense.weight" in added) == (backbone == "bert" and plain)  # RoBERTa has none
    assert left == {name for name in theirs if name.startswith(unused)} - ours.keys()
    assert bool(left) == (backbone != "gpt" or plain)
    for name in ours.keys() & theirs.keys():
        assert torch.equal(ours[name], theirs[name]), name
    experts = sum(p.numel() for p in ours.values() if is_expert(p))
    assert experts == 4 * 2 * 32 * 16 + 4 * (16 + 32)  # fc1 and fc2 of four experts in one layer, with biases


def pretraining_model(cfg: ClassificationConfig) -> Model:
    """What ``cfg`` was pretrained as."""
    family: Family = next(family for family in FAMILIES if family.classifier is family_of(cfg))
    plain = family.config(**{name: part for name, part in vars(cfg).items() if name not in ("finetune", "examples")})
    ctx = offline_context(device="cpu")
    return family.build(plain, VOCAB, ctx, MoETelemetry(ctx.device))


def test_pool() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    assert pool(hidden, mask, "first").tolist() == [[0, 1, 2], [12, 13, 14]]
    assert pool(hidden, mask, "last").tolist() == [[3, 4, 5], [12, 13, 14]]
    assert pool(hidden, mask, "mean").tolist() == [[1.5, 2.5, 3.5], [0, 0, 0]]


@pytest.mark.parametrize("backbone", CLASSES)
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_padding_and_neighbours_do_not_matter(backbone: str, pooling: str) -> None:
    if backbone == "gpt" and pooling == "first":
        pooling = "last"
    model = randomize(build(config_of(backbone, pooling=pooling))).eval()
    lengths = [5, 16, 9, 0]
    logits, aux_loss = model(*batch_of(lengths))
    assert torch.isfinite(logits).all() and torch.isfinite(aux_loss)
    tokens, types, mask = batch_of(lengths)
    for row, length in enumerate(lengths[:3]):
        alone, _ = model(tokens[row : row + 1, :length], types[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1])
    blank, aux_loss = model(*batch_of([0, 0]))
    assert torch.isfinite(blank).all() and torch.isfinite(aux_loss)


def test_dropout_of_the_head_only_in_training() -> None:
    model = build(config_of("gpt", classifier_dropout=0.5))
    batch = batch_of([7, 3])
    assert not torch.equal(model(*batch)[0], model(*batch)[0])
    model.eval()
    assert torch.equal(model(*batch)[0], model(*batch)[0])


def test_scorer_is_the_language_model() -> None:
    cfg = config_of("gpt")
    ctx = offline_context(device="cpu")
    model = randomize(make_gpt(cfg))
    scorer = GPTScorer(cfg, VOCAB, ctx, MoETelemetry(ctx.device))
    scorer.load_state_dict(model.state_dict())
    tokens, _, mask = batch_of([12, 4])
    labels = tokens.roll(-1, 1)
    scores = scorer(tokens, labels, mask)
    for row, length in enumerate((12, 4)):
        loss, _ = model(tokens[row : row + 1, :length], labels[row : row + 1, :length])
        torch.testing.assert_close(scores[row, :length], loss[0], rtol=1e-4, atol=1e-5)


def _on_two_ranks() -> dict[tuple[str, str], tuple[list, dict[str, list]]]:
    results = {}
    for layout in ("tp", "ep"):  # without leaving torch.distributed in between: a rank could find the other's old keys
        name = "tensor_model_parallel_size" if layout == "tp" else "expert_model_parallel_size"
        ctx = initialize(ParallelConfig(device="cpu", sequence_parallel=layout == "tp", **{name: 2}), moe=True)
        for backbone in CLASSES:
            results[layout, backbone] = _logits_and_gradients(backbone, ctx)
    return results


def _logits_and_gradients(backbone: str, ctx: ParallelContext) -> tuple[list, dict[str, list]]:
    model = build(config_of(backbone), ctx)
    logits, aux_loss = model(*batch_of([5, 16]))
    (nn.functional.cross_entropy(logits, torch.tensor([2, 0])) + aux_loss).backward()
    gradients = full_gradients(model)
    return logits.tolist(), {name: gradients[name].tolist() for name in gradients if name.startswith(COMPARED)}


def test_tensor_and_expert_parallel_ranks_agree_with_one() -> None:
    (first, _) = run_distributed_test(_on_two_ranks, 2)
    for (layout, backbone), (logits, gradients) in first.items():
        expected_logits, expected = _logits_and_gradients(backbone, offline_context(device="cpu"))
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected_logits), rtol=1e-4, atol=1e-5)
        assert gradients.keys() == expected.keys() and len(gradients) >= 4
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                torch.tensor(gradient),
                torch.tensor(expected[name]),
                rtol=1e-3,
                atol=1e-5,
                msg=f"{layout} {backbone} {name}",
            )
