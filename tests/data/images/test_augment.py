"""Random changes of pictures and mixing in pairs: their bounds, their frequencies, and that they depend on numbers alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lsh.config.images import ImageSettings
from megatron_lsh.data.images.augment import crop_box, erased, for_evaluation, for_training
from megatron_lsh.data.images.mixing import NONE, mixed_images, mixture, targets
from megatron_lsh.data.images.randaugment import OPERATIONS, randaugment
from tests.data.images.record_kornia import FILE as KORNIA
from tests.data.images.record_kornia import STRENGTHS
from tests.data.images.record_kornia import picture as recorded_picture

PLAIN = ImageSettings(
    crop_scale=[1.0, 1.0], hflip=0.0, randaugment_ops=0, random_erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    return Image.fromarray(rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_without_changes_a_picture_is_itself() -> None:
    picture = noise()
    expected = np.asarray(picture).transpose(2, 0, 1)
    assert np.array_equal(for_training(picture, (20, 24), PLAIN, rng()), expected)
    mirrored = for_training(picture, (20, 24), dataclasses.replace(PLAIN, hflip=1.0), rng())
    assert np.array_equal(mirrored, expected[:, :, ::-1])
    shades = picture.convert("L")
    assert np.array_equal(for_training(shades, (20, 24), PLAIN, rng())[0], np.asarray(shades))


def test_the_same_numbers_change_a_picture_in_the_same_way() -> None:
    cfg = dataclasses.replace(ImageSettings(), random_shift=2, random_rotation=10.0)
    first, again, other = (for_training(noise(), (16, 18), cfg, rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == (3, 16, 18) and first.dtype == np.uint8


def test_random_crops_keep_to_their_bounds() -> None:
    scale, ratio, size = [0.2, 0.5], [0.5, 2.0], (40, 30)
    areas, ratios = [], []
    for seed in range(400):
        left, top, right, bottom = crop_box(size, scale, ratio, rng(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        areas.append((right - left) * (bottom - top) / (size[0] * size[1]))
        ratios.append((right - left) / (bottom - top))
    assert min(areas) > 0.17 and max(areas) < 0.53 and np.ptp(areas) > 0.25
    assert min(ratios) > 0.45 and max(ratios) < 2.2 and abs(np.mean(np.log(ratios))) < 0.1
    assert crop_box((100, 2), [1.0, 1.0], [0.9, 1.1], rng()) == (49, 0, 51, 2)  # never fits: the centre


def test_a_shift_moves_and_a_turn_turns() -> None:
    dot = Image.new("L", (9, 9), 10)
    dot.putpixel((4, 4), 250)
    cfg = dataclasses.replace(PLAIN, random_shift=2)
    places = set()
    for seed in range(200):
        moved = for_training(dot, (9, 9), cfg, rng(seed))[0]
        ((y, x),) = np.argwhere(moved > 200)
        places.add((int(y) - 4, int(x) - 4))
        assert (np.sort(moved, axis=None)[:-1] == 10).all()
    assert places == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    line = Image.new("L", (9, 9))
    for x in range(9):
        line.putpixel((x, 4), 255)
    turned = for_training(line, (9, 9), dataclasses.replace(PLAIN, random_rotation=30.0), rng(2))
    assert (turned.argmax(1) != 4).any()


def test_erasing_replaces_one_rectangle() -> None:
    image = np.full((3, 32, 32), 7, dtype=np.uint8)
    shares = []
    for seed in range(100):
        changed = (erased(image, ImageSettings(), rng(seed)) != 7).any(0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.9
        shares.append(box.size / changed.size)
    assert min(shares) > 0.01 and max(shares) < 0.36 and np.ptp(shares) > 0.2
    assert (image == 7).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_changes_more_with_more_strength(name: str) -> None:
    """And keeps size and mode, in colour and in shades of grey; those without a strength always do the same."""
    ramp = np.tile(np.linspace(40, 180, 32), (32, 1)) + rng().normal(0, 10, (32, 32))
    picture = Image.fromarray(ramp.astype(np.uint8))
    picture = Image.merge("RGB", [picture, picture.rotate(90), picture.rotate(180)])
    for image in (picture, picture.convert("L")):
        fill = (9,) * len(image.getbands())
        changes = []
        for m in (0.0, 0.5, 1.0):
            changed = OPERATIONS[name](image, m, fill)
            assert (changed.size, changed.mode) == (image.size, image.mode)
            changes.append(np.abs(np.asarray(changed, dtype=int) - np.asarray(image, dtype=int)).mean())
        if name in ("autocontrast", "equalize", "invert"):
            assert changes[0] == changes[1] == changes[2] > 0
        elif name == "color" and image.mode == "L":
            assert max(changes) == 0
        else:
            assert changes[0] <= changes[1] <= changes[2] and changes[2] > changes[0]


def test_operations_by_their_definitions() -> None:
    values = np.arange(256, dtype=np.uint8)
    picture = Image.fromarray(values.reshape(16, 16))

    def of(name: str, m: float) -> np.ndarray:
        return np.asarray(OPERATIONS[name](picture, m, (0,))).reshape(-1)

    assert np.array_equal(of("invert", 0), 255 - values)
    assert np.array_equal(of("solarize", 0.5), np.where(values < 128, values, 255 - values))
    assert np.array_equal(of("posterize", 0.5), values & 0b11000000)
    assert np.array_equal(of("solarize_add", 0.5), np.where(values < 128, values + 55, values))
    assert np.abs(of("brightness", 0.5).astype(float) - np.minimum(values * 1.45, 255)).max() <= 1
    shifted = np.asarray(OPERATIONS["translate_x"](picture, 1 / 7.2, (0,)))  # 0.45 / 7.2 of 16 pixels: one
    assert np.array_equal(shifted[:, :-1], np.asarray(picture)[:, 1:]) and (shifted[:, -1] == 0).all()


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"solarize_add"}))
def test_operations_agree_with_recorded_ones_of_another_library(name: str) -> None:
    """To two steps of brightness: Pillow rounds, the other does not. Moved pictures where they come from inside."""
    with np.load(KORNIA) as recorded:
        for m in STRENGTHS:
            ours = np.asarray(OPERATIONS[name](Image.fromarray(recorded_picture()), m, (0, 0, 0)))
            apart = np.abs(ours.astype(int) - recorded[f"{name} {m}"])
            moved = f"{name} inside {m}"
            if moved in recorded:
                inside = recorded[moved] > 0
                assert inside.mean() > 0.4
                apart = apart[inside]
            assert apart.max() <= 2, (m, apart.max())


def test_randaugment_does_half_of_what_it_chooses() -> None:
    picture = noise()
    changed = [
        not np.array_equal(np.asarray(randaugment(picture, 1, 9.0, 0.0, (0, 0, 0), rng(seed))), np.asarray(picture))
        for seed in range(300)
    ]
    assert 0.35 < np.mean(changed) < 0.6


def test_evaluation_sees_the_centre() -> None:
    picture = noise(40, 40)
    assert np.array_equal(
        for_evaluation(picture, (40, 40), dataclasses.replace(PLAIN, eval_crop_ratio=1.0)),
        np.asarray(picture).transpose(2, 0, 1),
    )
    half = for_evaluation(picture, (20, 20), dataclasses.replace(PLAIN, eval_crop_ratio=0.5))
    assert np.array_equal(half, np.asarray(picture)[10:30, 10:30].transpose(2, 0, 1))
    assert for_evaluation(noise(50, 20), (16, 16), PLAIN).shape == (3, 16, 16)


# Mixing.

MIXES = ImageSettings()


def test_pairs_are_mixed_as_their_number_says() -> None:
    found = [mixture(MIXES, (32, 24), 7, pair) for pair in range(600)]
    assert found[:9] == [mixture(MIXES, (32, 24), 7, pair) for pair in range(9)]
    assert found[:9] != [mixture(MIXES, (32, 24), 8, pair) for pair in range(9)]
    cut = [some for some in found if some.box != NONE.box]
    assert 0.4 < len(cut) / len(found) < 0.6
    for share, (top, bottom, left, right) in cut:
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 24
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / (32 * 24))
    shares = np.asarray([some.share for some in found if some.box == NONE.box])
    assert abs(shares.mean() - 0.5) < 0.06 and abs(shares.var() - 1 / (4 * 2.6)) < 0.02  # of Beta(0.8, 0.8)
    half = dataclasses.replace(MIXES, mix_prob=0.5)
    assert 0.4 < sum(mixture(half, (32, 32), 1, pair) == NONE for pair in range(400)) / 400 < 0.6


def test_mixed_pictures_and_their_targets() -> None:
    images = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([0.25, 0.25, 0.75, 0.75, 1.0, 1.0])
    box = torch.tensor([[0, 0, 0, 0]] * 2 + [[1, 3, 0, 2]] * 2 + [[0, 0, 0, 0]] * 2)
    mixed, plain = mixed_images(images, share, box), images.float() / 255
    torch.testing.assert_close(mixed[0], 0.25 * plain[0] + 0.75 * plain[1])
    torch.testing.assert_close(mixed[1], 0.25 * plain[1] + 0.75 * plain[0])
    expected = plain[2].clone()
    expected[:, 1:3, 0:2] = plain[3][:, 1:3, 0:2]
    assert torch.equal(mixed[2], expected) and torch.equal(mixed[4:], plain[4:])
    wanted = targets(torch.tensor([0, 1, 2, 2, 1, 0]), share, 4, 0.2)
    torch.testing.assert_close(wanted.sum(1), torch.ones(6))
    torch.testing.assert_close(wanted[0], torch.tensor([0.25, 0.65, 0.05, 0.05]))
    torch.testing.assert_close(wanted[2], torch.tensor([0.05, 0.05, 0.85, 0.05]))
    torch.testing.assert_close(wanted[4], torch.tensor([0.05, 0.85, 0.05, 0.05]))
