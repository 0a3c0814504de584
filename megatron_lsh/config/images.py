"""Settings of pictures: where they are, how they are cut, changed and mixed for training, and how they are evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.flag import flag

if TYPE_CHECKING:
    from megatron_lsh.config.swin import SwinConfig


_PILLOW_WARNS = 89_478_485  # pixels


@dataclass
class ImageSettings:
    """Pictures with labels: reading, augmentation, evaluation. docs/vision.md describes all of it."""

    epochs: int | None = flag(None, "Times to read the training pictures, in place of --train-iters", at_least=1)
    hf_image_key: str = flag("image", "Column with the picture of a Hugging Face data set")
    hf_label_key: str = flag("label", "Column with the class of a Hugging Face data set")
    skip_broken_images: bool = flag(
        False, "Put another picture of the set in the place of one that cannot be read, and count them"
    )
    picture_sheet: str | None = flag(
        None, "At the end, draw validation pictures with what they are taken for into this PNG file"
    )
    max_image_pixels: int = flag(
        _PILLOW_WARNS,
        "Pixels above which a picture is refused (Pillow warns from here on)",
        at_least=1,
        at_most=2 * _PILLOW_WARNS,  # beyond which it refuses
    )
    image_mean: list[float] = flag([0.485, 0.456, 0.406], "Mean of each channel, of values between 0 and 1")
    image_std: list[float] = flag([0.229, 0.224, 0.225], "Standard deviation of each channel", above=0)
    interpolation: str = flag("bicubic", "How pictures are resized", choices=("bicubic", "bilinear", "nearest"))
    eval_crop_ratio: float = flag(
        0.875,
        "Side of the centre that evaluations see, as a share of the resized picture's shorter side",
        above=0,
        at_most=1,
    )
    crop_scale: list[float] = flag(
        [0.08, 1.0],
        "Least and largest share of a picture's area that training crops (1 1: no random crop)",
        above=0,
        at_most=1,
    )
    crop_ratio: list[float] = flag([0.75, 4 / 3], "Least and largest width / height of a random crop", above=0)
    random_shift: int = flag(0, "Move training pictures by up to so many pixels each way", at_least=0)
    random_rotation: float = flag(
        0.0, "Turn training pictures by up to so many degrees each way", at_least=0, at_most=180
    )
    hflip: float = flag(0.5, "Probability of a mirror image", at_least=0, at_most=1)
    randaugment_ops: int = flag(2, "Random operations on a training picture (RandAugment; 0: none)", at_least=0)
    randaugment_magnitude: float = flag(9.0, "Their mean strength, of 10", at_least=0, at_most=10)
    randaugment_std: float = flag(0.5, "Standard deviation of their strength", at_least=0)
    random_erasing: float = flag(0.25, "Probability that a rectangle is replaced by noise", at_least=0, at_most=1)
    mixup: float = flag(0.8, "Parameter alpha of mixup (0: none)", at_least=0)
    cutmix: float = flag(1.0, "Parameter alpha of cutmix (0: none)", at_least=0)
    mix_prob: float = flag(1.0, "Probability that a pair is mixed at all", at_least=0, at_most=1)
    mix_switch_prob: float = flag(0.5, "Probability of cutmix where both are on", at_least=0, at_most=1)
    label_smoothing: float = flag(0.1, "Share of the target that is spread over all classes", at_least=0, below=1)

    @staticmethod
    def per_channel(numbers: list[float], channels: int) -> list[float]:
        """--image-mean or --image-std for so many channels: as given, one for all, or for one channel the mean of three."""
        return list(numbers) if len(numbers) == channels else [sum(numbers) / len(numbers)] * channels

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed in pairs."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def check_images(cfg: SwinConfig, check: Checker) -> None:
    """Rules of pictures that single values do not show."""
    for name in ("crop_scale", "crop_ratio"):
        check.rule(
            f"{{{name}}} must be two numbers, the smaller one first", lambda pair: len(pair) == 2 and pair[0] <= pair[1]
        )
    for name in ("image_mean", "image_std"):
        check.rule(
            f"{{{name}}} must be one number, or one for each of {{num_channels}}",
            lambda numbers, channels: len(numbers) in (1, 3, channels),
        )
    if cfg.images.mixes and not (cfg.training.skip_train or cfg.training.dry_run):
        check.rule(
            "{micro_batch_size} must be even with mixup and cutmix, which mix pictures in pairs",
            lambda size: size % 2 == 0,
            "change --micro-batch-size, or set --mixup 0 --cutmix 0",
        )
    check.rule("{random_shift} must be less than {img_h}", lambda shift, height: shift < height)
    check.rule("{mock_data} must be off", lambda on: not on, "drop it, and give pictures with --data-path")
    if "train_samples" not in cfg.derived:
        for name in ("train_iters", "train_samples"):
            check.rule(f"{{epochs}} and {{{name}}} must not both be given", lambda *_: False, "drop one of them")
    if cfg.training.dry_run:
        return
    data = cfg.data
    if not cfg.training.skip_train and data.data_path is None and data.train_data_path is None:
        check.problems.append(
            "data.data_path (absent) must be given: set --data-path FOLDER (IDX files, or a folder per class), or hf:NAME"
        )
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        check.rule(f"{{{name}}} must be one folder, or hf:NAME", lambda words: len(words) == 1)
