"""Losses are means over tokens: the same however samples are cut into micro-batches and spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lsh.config import validate
from megatron_lsh.data.loader import Datasets
from megatron_lsh.families import BERT, GPT, T5, Family, Losses
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.evaluate import evaluate
from megatron_lsh.training.run import Run, set_up
from tests.training.helpers import TINY

#: Wide weights, so that tokens differ in their loss; few loss tokens, and not the same number in every sample.
SPREAD = "--init-method-std 0.1 --train-iters 4 --moe-layer-freq ([0]+[1])"
FLAGS = {
    GPT: "--eod-mask-loss",
    BERT: "--short-seq-prob 0.7",
    T5: "--encoder-num-layers 2 --decoder-num-layers 2 --encoder-seq-length 32 --decoder-seq-length 16 "
    "--short-seq-prob 0.7 --vocab-extra-ids 10",
}
each_family = pytest.mark.parametrize("family", FLAGS, ids=lambda family: family.name)


class Uneven:
    """Samples of which every other one has a loss on few of its tokens."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        few = np.arange(len(sample["loss_mask"])) < 3 + index if index % 2 else True
        return sample | {"loss_mask": sample["loss_mask"] * few}

    def fingerprint(self) -> str:
        return "uneven " + str(self.dataset.fingerprint())


def run_of(family: Family, flags: str = "", world_size: int = 1) -> Run:
    cfg = validate(family.parse(f"{TINY} {SPREAD} {FLAGS[family]} {flags}".split()), world_size)

    def datasets(*arguments: Any) -> Datasets:
        return Datasets(*map(Uneven, GPT.datasets(*arguments)))

    return set_up(cfg, replace(family, datasets=datasets) if family is GPT else family, initialize(cfg.parallel))


@pytest.fixture
def one_rank_at_a_time() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def validation_loss(run: Run) -> float:
    with run.batches("valid") as batches:
        figures = evaluate(run.step.pipeline, run.judge, batches)
    assert figures is not None
    return figures["loss"]


def sums_and_tokens(run: Run, split: str) -> list[tuple[float, int]]:
    """Sum of the losses, and number of tokens with a loss, of every sample of a set on its own."""
    found = []
    run.model.eval()
    with run.batches(split) as batches, torch.no_grad():
        for batch in batches:
            for row in range(len(next(iter(batch.values())))):
                sample = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                tokens = int(sample["loss_mask"].sum())
                found.append((tokens * float(run.step.forward_step(run.model, sample).main.value), tokens))
    run.model.train()
    return found


@each_family
def test_validation_loss_does_not_depend_on_the_micro_batch(family: Family, one_rank_at_a_time: None) -> None:
    losses = []
    for size in (8, 2, 1):
        run = run_of(family, f"--micro-batch-size {size}")
        losses.append(validation_loss(run))
        samples = sums_and_tokens(run, "valid")
        dist.destroy_process_group()
    assert len(samples) == 8 and len({tokens for _, tokens in samples}) > 2
    mean = sum(loss for loss, _ in samples) / sum(tokens for _, tokens in samples)
    assert losses == pytest.approx([mean] * 3, rel=1e-6)
    mean_of_means = sum(loss / tokens for loss, tokens in samples) / len(samples)
    assert abs(mean_of_means - mean) > 1e-4 * mean, "these samples would not tell the two apart"


def curves(layouts: tuple[str, ...], world_size: int) -> dict[str, list[tuple[float, ...]]]:
    """(validation loss at first; loss, further losses and gradient norm of every step), by family and layout."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for family in FLAGS:
        for layout in layouts:
            run = run_of(family, f"{layout} --global-batch-size 4 --calculate-per-token-loss", world_size)
            curve: list[tuple[float, ...]] = [(validation_loss(run),)]
            with run.batches("train") as batches:
                for iteration in range(2):
                    result = run.step(batches, iteration, False)
                    curve.append((result.loss, result.grad_norm, *result.further.values()))
            found[f"{family.name} {layout}"] = curve
    return found


@pytest.mark.slow
def test_two_ranks_find_what_one_finds_with_calculate_per_token_loss(one_rank_at_a_time: None) -> None:
    layouts = ("--micro-batch-size 1 --expert-model-parallel-size 2", "--tensor-model-parallel-size 2")
    # The balancing loss of a micro-batch depends on what it is, so micro-batches have the same size on both sides.
    alone = curves(("--micro-batch-size 1", "--micro-batch-size 2"), 1)
    for ranks in run_distributed_test(curves, 2, layouts, 2):
        for key, curve in ranks.items():
            expected = alone[f"{key.split()[0]} --micro-batch-size {1 if 'micro' in key else 2}"]
            for (loss, *norm_and_further), (wanted, *others) in zip(curve, expected, strict=True):
                assert loss == pytest.approx(wanted, rel=1e-5), key
                assert norm_and_further == pytest.approx(others, rel=1e-3), key


def gradients_of_one_step(run: Run) -> dict[str, Tensor]:
    """What plain SGD subtracts from each parameter in one iteration at a learning rate of 1."""
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    with run.batches("train") as batches:
        run.step(batches, 0, False)
    return {name: before[name] - parameter.detach() for name, parameter in run.model.named_parameters()}


@each_family
def test_calculate_per_token_loss_is_the_gradient_of_the_mean_over_all_tokens(
    family: Family, one_rank_at_a_time: None
) -> None:
    plain_sgd = "--optimizer sgd --sgd-momentum 0 --weight-decay 0 --lr 1 --clip-grad 0 --calculate-per-token-loss"
    run = run_of(family, plain_sgd)
    with run.batches("train") as batches:
        micro_batches = [next(batches) for _ in range(run.step.micro_batches)]
    tokens = sum(int(batch["loss_mask"].sum()) for batch in micro_batches)
    assert len({int(batch["loss_mask"].sum()) for batch in micro_batches}) > 2
    objective = torch.zeros(())
    for batch in micro_batches:
        losses: Losses = run.step.forward_step(run.model, batch)
        objective = objective + losses.main.value * int(batch["loss_mask"].sum()) / tokens
        # Megatron-LM's weight: tokens that the router saw, over tokens with a loss. Where only some tokens are predicted
        # (BERT, T5) ours counts those, so that the coefficient means what it means without the flag.
        seen = batch["tokens"].numel() if family is GPT else int(batch["loss_mask"].sum())
        objective = objective + losses.auxiliary.value * seen / tokens
        objective = objective + sum(mean.value for mean in losses.further.values()) / len(micro_batches)
    objective.backward()
    wanted = {
        name: parameter.grad.clone() for name, parameter in run.model.named_parameters() if parameter.grad is not None
    }
    for layer in run.model.moe_layers():
        layer.router.discard_counts()
    found = gradients_of_one_step(run)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
