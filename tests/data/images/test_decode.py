"""What becomes of each kind of picture: converted as docs/vision.md says, or refused with the file's name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_lsh.data.images.decode import decode, pixels
from megatron_lsh.errors import DataError

SIZE = (6, 5)
PIXELS = 10_000


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rgb(content: bytes, channels: int = 3) -> np.ndarray:
    return pixels(decode(content, "x", channels, PIXELS))


def ramp() -> Image.Image:
    return Image.fromarray((np.arange(30) * 8).astype(np.uint8).reshape(5, 6))


def test_a_bitmap_of_5_6_and_5_bits_is_an_ordinary_picture() -> None:
    pixel = (31 << 11 | 21 << 5 | 10).to_bytes(2, "little")
    header = b"BM" + (66 + 8).to_bytes(4, "little") + bytes(4) + (66).to_bytes(4, "little")
    info = [40, 2, 2, 1 | 16 << 16, 3, 8, 0, 0, 0, 0, 0xF800, 0x07E0, 0x001F]
    content = header + b"".join(value.to_bytes(4, "little") for value in info) + pixel * 4
    assert rgb(content)[:, 0, 0].tolist() == [255, 85, 82]


def test_shades_of_grey_palettes_and_other_spaces_become_rgb() -> None:
    grey = np.asarray(ramp())
    assert np.array_equal(rgb(encoded(ramp(), "PNG")), np.stack([grey] * 3))
    assert np.array_equal(rgb(encoded(ramp(), "PNG"), 1), grey[None])
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 4, (5, 6, 3), dtype=np.uint8) * 60)
    palette = colours.quantize(256)
    assert np.array_equal(rgb(encoded(palette, "PNG")), rgb(encoded(palette.convert("RGB"), "PNG")))
    bits = ramp().point(lambda value: 255 * (value > 100)).convert("1")
    assert set(rgb(encoded(bits, "PNG")).flatten().tolist()) == {0, 255}
    cmyk = Image.new("CMYK", SIZE, (255, 0, 0, 0))
    assert rgb(encoded(cmyk, "TIFF"))[:, 0, 0].tolist() == [0, 255, 255]
    assert rgb(encoded(cmyk, "JPEG", quality=100))[:, 0, 0].tolist() == pytest.approx([0, 255, 255], abs=3)


def test_what_is_transparent_lies_on_white() -> None:
    red = Image.new("RGBA", SIZE, (200, 0, 0, 0))
    red.putpixel((1, 0), (200, 0, 0, 255))
    shown = rgb(encoded(red, "PNG"))
    assert shown[:, 0, 0].tolist() == [255] * 3 and shown[:, 0, 1].tolist() == [200, 0, 0]
    assert rgb(encoded(red, "PNG"), 1)[:, 0, 0].tolist() == [255]
    palette = Image.new("P", SIZE)
    palette.putpalette([9, 9, 9])
    assert rgb(encoded(palette, "PNG", transparency=0))[:, 0, 0].tolist() == [255] * 3


def refused() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(ramp().resize((60, 50)), "JPEG")
    png = encoded(ramp().resize((60, 50)), "PNG")
    frames = [Image.new("L", SIZE, shade) for shade in (0, 99)]
    return {
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "cannot be read"),
        "truncated png": (png[: len(png) // 2], "cannot be read"),
        "no picture": (b"GIF? no", "cannot identify"),
        "empty": (b"", "cannot identify"),
        "16 bits": (encoded(Image.fromarray(np.zeros((5, 6), dtype=np.uint16)), "PNG"), "16 or more bits"),
        "16 bits, tiff": (encoded(Image.fromarray(np.zeros((5, 6), dtype=np.uint16)), "TIFF"), "16 or more bits"),
        "16 bits, colour": (deep_png(), "16 or more bits"),
        "floats": (encoded(Image.fromarray(np.zeros((5, 6), dtype=np.float32)), "TIFF"), "16 or more bits"),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "has 2 frames"),
        "huge": (
            encoded(Image.new("1", (200, 200)), "PNG"),
            "has 200 x 200 pixels, and --max-image-pixels allows 10000",
        ),
    }


def deep_png() -> bytes:
    """RGB of 16 bits, which Pillow reads as 8 bits without a word."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 1, 2, 3, 4, 5, 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", refused())
def test_what_cannot_be_shown_as_it_is_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, why = refused()[name]
    path = tmp_path / "some picture.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(DataError) as error:
            decode(source, str(path), 3, PIXELS)
        assert str(error.value).startswith(str(path)) and why in str(error.value)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = encoded(Image.new("1", (9_500, 9_500)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(DataError, match="pixels"):
        decode(bomb, "bomb.png", 3, 89_478_485)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 3), st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_damage_is_an_error_or_a_picture(kind: int, place: int, damage: bytes) -> None:
    image = Image.effect_noise((24, 24), 80).convert("RGB")
    content = bytearray(encoded(image, ("PNG", "JPEG", "GIF", "BMP")[kind]))
    place %= len(content)
    content[place : place + len(damage)] = damage
    try:
        assert rgb(bytes(content)).dtype == np.uint8
    except DataError as error:
        assert str(error).startswith("x ")
