"""A family is one record: the ones there are, and one of another kind, made here of public names only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lsh.config import Config, validate
from megatron_lsh.config.reference import SCRIPTS
from megatron_lsh.data.loader import Datasets
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import FAMILIES, GPT, Batch, Criterion, Family, Head, Losses, Mean, family_of
from megatron_lsh.families.scores import ClassJudge
from megatron_lsh.models.bert import Dense
from megatron_lsh.models.model import Model
from megatron_lsh.models.stacks import Stack
from megatron_lsh.models.transformer import TransformerBlock
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.parameters import Init
from megatron_lsh.training.train import train
from tests.training.helpers import tiny_config


def records() -> Iterator[Family]:
    for family in FAMILIES:
        yield family
        if family.classifier is not None:
            yield family.classifier


def test_the_class_of_a_configuration_says_which_family_it_is_of() -> None:
    for family in records():
        assert family_of(family.config()) is family
    assert len({family.name for family in records()}) == len(list(records()))


def test_the_page_of_flags_has_all_of_them() -> None:
    assert {config for configs in SCRIPTS.values() for config in configs} == {family.config for family in records()}


# A family whose samples are no text: pictures of four patches, in which the brightest patch is the class.

PATCHES, PIXELS = 4, 8


@dataclass(frozen=True)
class Pictures:
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        state = np.random.RandomState(1000 * self.seed + index)
        patches = state.uniform(size=(PATCHES, PIXELS)).astype(np.float32)
        brightest = np.asarray(state.randint(PATCHES), dtype=np.int64)
        patches[brightest] += 1.0
        return {"patches": patches, "label": brightest}

    def fingerprint(self) -> str:
        return f"pictures {self.seed}"


def picture_stacks(cfg: Config) -> tuple[Stack, ...]:
    return (Stack(cfg, "encoder", causal=False),)


class PictureModel(Model):
    def __init__(self, cfg: Config, vocab_size: int, ctx: ParallelContext, telemetry: MoETelemetry) -> None:
        assert vocab_size == 0
        super().__init__(ctx, telemetry)
        (stack,) = picture_stacks(cfg)
        init = Init("normal", 0.1)
        self.embedding = Dense(PIXELS, stack.shape.hidden, ctx, init)
        self.encoder = TransformerBlock(stack, ctx, telemetry)
        self.head = Dense(stack.shape.hidden * PATCHES, PATCHES, ctx, init)

    def forward(self, patches_BSP: Tensor) -> tuple[Tensor, Tensor]:
        x_SBD, aux_loss = self.encoder(self.embedding(patches_BSP.transpose(0, 1)))
        self.telemetry.count_micro_batch()
        return self.head(x_SBD.transpose(0, 1).flatten(1)), aux_loss


def picture_losses(cfg: Config, model: PictureModel, batch: Batch) -> Losses:
    logits_BC, aux_loss = model(batch["patches"])
    return Losses(Mean.of(F.cross_entropy(logits_BC, batch["label"], reduction="none")), Mean(aux_loss, len(logits_BC)))


@dataclass
class PictureConfig(Config):
    indexed_data: ClassVar[bool] = False
    tokenized: ClassVar[bool] = False


PICTURES = Family(
    name="pictures",
    config=PictureConfig,
    stacks=picture_stacks,
    model=PictureModel,
    head=lambda cfg, vocab_size: Head(),
    datasets=lambda cfg, tokenizer, ctx, counts: Datasets(Pictures(counts[0], 1), Pictures(64, 2), Pictures(64, 3)),
    losses=picture_losses,
    loss_tokens=lambda batch: len(batch["label"]),
    tokenizer=None,
    judge=lambda cfg: ClassJudge(PATCHES, lambda model, batch: model(batch["patches"])[0]),
    criterion=lambda cfg: Criterion("accuracy"),
)


@pytest.mark.parametrize("width", [1 << 40, 1 << 61])
def test_a_model_beyond_any_memory_is_refused(width: int) -> None:
    cfg = tiny_config()
    cfg.model.ffn_hidden_size, cfg.moe.num_experts = width, None
    ctx = offline_context(device="cpu")
    with pytest.raises(ConfigError, match=r"does not fit into the memory of cpu \(.+\): make it smaller"):
        GPT.build(cfg, 64, ctx, MoETelemetry(ctx.device))


def test_a_family_without_a_tokenizer_trains_and_is_judged_by_its_own_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 4 --attention-dropout 0 --hidden-dropout 0 "
        "--position-embedding-type none --num-experts 4 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 1e-2 "
        "--moe-token-dispatcher-type lsh --micro-batch-size 16 --global-batch-size 32 --train-iters 60 --eval-interval 30 "
        "--lr 5e-3 --lr-decay-style constant --num-workers 0 --no-progress --peak-tflops 1 --device cpu "
        f"--save {tmp_path}/run --metrics-jsonl {tmp_path}/m.jsonl"
    )
    state = train(validate(PICTURES.parse(flags.split()), 1), PICTURES)
    out = capsys.readouterr().out
    assert state.iteration == 60 and "vocabulary" not in out
    first, second = [record for record in read_jsonl(tmp_path / "m.jsonl") if "validation_accuracy" in record]
    assert second["validation_accuracy"] > max(first["validation_accuracy"] - 0.1, 0.9)
    assert out.strip().splitlines()[-1].startswith("result: validation loss ")
    assert (tmp_path / "run" / "best").is_dir()


def test_losses_are_means_that_know_their_number() -> None:
    few, many = Mean(torch.tensor(4.0), torch.tensor(1.0)), Mean(torch.tensor(2.0), torch.tensor(3.0))
    zero = Mean(torch.tensor(0.0), 1)
    plain = [Losses(main, zero).objective(micro_batches=2) for main in (few, many)]
    weighed = [Losses(main, zero).objective(micro_batches=2, token_weight=1 / 4) for main in (few, many)]
    assert sum(plain) == 3.0 and sum(weighed) == 2.5  # (4 + 3 * 2) / 4


def test_mean_over_a_mask() -> None:
    loss_BS = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    three = Mean.of(loss_BS, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert three.value == 2.0 and three.sum_and_count().tolist() == [6.0, 3.0]
    nothing = Mean.of(loss_BS, torch.zeros(2, 2))
    assert nothing.value == 0.0 and nothing.sum_and_count().tolist() == [0.0, 0.0]
    assert Mean.of(loss_BS).sum_and_count().tolist() == [106.0, 4.0]
