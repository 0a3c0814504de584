"""Swin and Swin-MoE: classifiers of pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lsh.config import required, validate
from megatron_lsh.config.from_checkpoint import first_weights, kept_file
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.data.images.datasets import Reader, TrainingPictures
from megatron_lsh.data.images.mixing import mixed_images, targets
from megatron_lsh.data.images.sheet import Judged, draw_sheet
from megatron_lsh.data.images.sources import ImageSets, open_sets
from megatron_lsh.data.loader import BatchIterator, Datasets
from megatron_lsh.data.samples.classification import BLANK, EvaluationOrder
from megatron_lsh.errors import ConfigError, DataError
from megatron_lsh.families.family import Batch, Counts, Family, Head
from megatron_lsh.families.losses import Losses, Mean
from megatron_lsh.families.scores import TopJudge
from megatron_lsh.models.position_bias import resized_table
from megatron_lsh.models.swin import ASSUMED_CLASSES, HEAD, SwinModel, merging_multiply_adds, swin_stacks
from megatron_lsh.parallel.context import ParallelContext

LABELS = "classes.json"
"""the file of a checkpoint with the names of the classes, in the order of their numbers"""


def prepare(family: Family, written: SwinConfig, world_size: int) -> tuple[SwinConfig, Family]:
    """The validated configuration, with the classes and the length of the run that follow from the pictures; and the family
    with them.

    Raises:
        ConfigError, DataError: see ``validate`` and ``open_sets``; more classes than --num-classes.
    """
    cfg = validate(written, world_size)
    sets = read_sets(cfg)
    classes = cfg.swin.num_classes or len(sets.classes)
    if classes < len(sets.classes):
        raise ConfigError(
            f"swin.num_classes ({classes}) must be at least the number of classes in the data ({len(sets.classes)}): change "
            "--num-classes"
        )
    train = sets.parts.get("train")
    began = _kept_classes(first_weights(cfg.checkpoint, LABELS))
    swin = dataclasses.replace(written.swin, num_classes=classes)
    written = dataclasses.replace(written, swin=swin, examples=None if train is None else len(train))
    return validate(written, world_size), dataclasses.replace(
        family,
        datasets=partial(_datasets, sets),
        closing=partial(closing, sets.classes),
        renewed_parameters=(HEAD,) if began is not None and began != sets.classes else (),
        files={LABELS: (json.dumps(sets.classes, ensure_ascii=False) + "\n").encode()},
    )


def read_sets(cfg: SwinConfig) -> ImageSets:
    """The pictures that `cfg` names, their classes in the order that the checkpoint has learned, if one is continued.

    Raises:
        DataError: see ``open_sets``.
    """
    data, evaluates = cfg.data, cfg.training.skip_train
    places = {"all": data.data_path, "train": data.train_data_path}
    places |= {"valid": data.valid_data_path, "test": data.test_data_path}
    return open_sets(
        {name: words[0] if words else None for name, words in places.items()},
        cfg.images.hf_image_key,
        cfg.images.hf_label_key,
        data.split,
        _learned_classes(cfg),
        ("valid", "test") if evaluates else ("train", "valid", "test"),
    )


def _learned_classes(cfg: SwinConfig) -> list[str] | None:
    """The classes of the checkpoint that --load continues; None where there is none, or a new head is put on its weights."""
    if cfg.checkpoint.load is None or cfg.checkpoint.finetune:
        return None
    return _kept_classes(kept_file(cfg.checkpoint.load, cfg.checkpoint.ckpt_step, LABELS))


def _kept_classes(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        classes = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): name another checkpoint with --ckpt-step") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path} must be a list of names: name another checkpoint with --ckpt-step")
    return classes


def _datasets(sets: ImageSets, cfg: SwinConfig, tokenizer: None, ctx: ParallelContext, counts: Counts) -> Datasets:
    """Training pictures in the order of the run, and the others once each; says on rank 0 what there is."""
    size, images = cfg.image_size, cfg.images
    readers = {name: Reader(part, images, size, cfg.swin.num_channels) for name, part in sets.parts.items()}
    if ctx.rank == 0:
        for line in sets.notices:
            print(f"> {line}", flush=True)
        for name, part in sets.parts.items():
            print(
                f"{name} set: {len(part):,} pictures of {len(sets.classes)} classes, {part.pictures.what}", flush=True
            )
    multiple = required(cfg.training.micro_batch_size) * ctx.dp.size
    train = readers.get("train")
    return Datasets(
        TrainingPictures(train, cfg.training.seed, counts[0]) if train is not None and counts[0] else None,
        *(EvaluationOrder(readers[name], multiple) if name in readers else None for name in ("valid", "test")),
    )


def _not_read(cfg: SwinConfig, tokenizer: None, ctx: ParallelContext, counts: Counts) -> Datasets:
    raise AssertionError("the pictures are read by Family.prepare")


def losses(cfg: SwinConfig, model: SwinModel, batch: Batch) -> Losses:
    """Mean cross-entropy with the targets of mixed and smoothed labels, and the routers' auxiliary losses."""
    images, labels_B = batch["image"], batch["label"]
    if cfg.images.mixes:
        images = mixed_images(images, batch["mix_share"], batch["mix_box"])
    logits_BK, aux_loss = model(images)
    target_BK = targets(labels_B, batch["mix_share"], logits_BK.shape[1], cfg.images.label_smoothing)
    loss_B = F.cross_entropy(logits_BK.float(), target_BK, reduction="none")
    return Losses(Mean.of(loss_B), Mean(aux_loss, len(labels_B)))


def scores(model: Any, batch: Batch) -> Tensor:
    """Logits [B, K]; blank pictures are seen by no expert."""
    logits_BK: Tensor = model(batch["image"], batch["label"] != BLANK)[0]
    return logits_BK


def head(cfg: SwinConfig, vocab_size: int) -> Head:
    """The patches, their merging, and the linear layer behind the mean."""
    width, classes = swin_stacks(cfg)[-1].shape.hidden, cfg.swin.num_classes or ASSUMED_CLASSES
    return Head(merging_multiply_adds(cfg) + width * classes, classes)


def closing(
    classes: Sequence[str], cfg: SwinConfig, model: SwinModel, sets: Datasets, ctx: ParallelContext
) -> dict[str, str]:
    """--picture-sheet, drawn by the last rank of its share of the validation pictures. Collective.

    Raises:
        DataError: on the last rank, which has then computed as long as the others.
    """
    path = cfg.images.picture_sheet
    if path is None or sets.valid is None:
        return {}
    draws, judged = ctx.rank == ctx.world.size - 1, list[Judged]()
    model.eval()
    iterator = BatchIterator(
        sets.valid,
        consumed_samples=0,
        micro_batch_size=required(cfg.training.micro_batch_size),
        dp_rank=ctx.dp.rank,
        dp_size=ctx.dp.size,
        num_workers=0,
    )
    with torch.no_grad(), iterator as batches:
        for batch in batches:
            here = {name: value.to(ctx.device) for name, value in batch.items()}
            predicted_B = scores(model, here).argmax(-1).tolist()
            if draws:
                judged += [
                    Judged(image.numpy(), classes[label], classes[guess] if guess < len(classes) else str(guess))
                    for image, label, guess in zip(batch["image"], batch["label"].tolist(), predicted_B, strict=True)
                    if label != BLANK
                ]
    model.train()
    if draws:
        draw_sheet(Path(path), judged, "predicted classes: wrong ones in red with the true one, right ones in green")
    return {"pictures": path}


SWIN = Family(
    name="swin",
    config=SwinConfig,
    stacks=swin_stacks,
    model=SwinModel,
    head=head,
    datasets=_not_read,
    losses=losses,
    loss_tokens=lambda batch: len(batch["label"]),
    tokenizer=None,
    counts_images=True,
    judge=lambda cfg: TopJudge(scores),
    fresh_parameters=lambda cfg: () if cfg.training.skip_train else (HEAD,),
    resized_parameters={".position_bias.weight": resized_table},
    prepare=prepare,
)
