"""From a file to pixels, by Pillow: what is converted, and what is refused with the file's name.

Shades of grey, palettes, CMYK and other colour spaces become RGB (with one channel: shades of grey); what is transparent
lies on white. Refused: files that Pillow cannot read to the end, more pixels than --max-image-pixels, more than one frame
(but for MPO, a photograph with previews), and 16 bits or floating-point numbers per channel, for which there is no one way
to 8 bits.
A picture lies as it is stored: an orientation in its EXIF data is not followed.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lsh.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff")
"""of files that are taken for pictures"""
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def pillow() -> Any:
    """The module ``PIL.Image``. Raises DataError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("pictures need the package Pillow, which is not installed: pip install pillow") from error
    return Image


def decode(content: Path | bytes | Any, what: str, channels: int, most_pixels: int) -> Image.Image:
    """A picture of mode RGB, or L for one channel.

    Args:
        content: a file, its bytes, or a picture that Pillow made.
        what: names it in errors.

    Raises:
        DataError: for what is refused, see above.
    """
    module = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb: --max-image-pixels decides
            picture: Any = content
            if isinstance(content, bytes | Path):
                picture = module.open(io.BytesIO(content) if isinstance(content, bytes) else content)
            _refuse(picture, what, most_pixels)
            return _converted(picture, channels)
    except DataError:
        raise
    except Exception as error:  # of a damaged file Pillow raises about anything
        raise DataError(
            f"{what} cannot be read ({first_line(error)}): replace it, or give --skip-broken-images"
        ) from error


def _refuse(picture: Any, what: str, most_pixels: int) -> None:
    width, height = picture.size
    if width * height > most_pixels:
        raise DataError(
            f"{what} has {width} x {height} pixels, and --max-image-pixels allows {most_pixels}: make it smaller, or "
            "raise that"
        )
    layout = str(getattr(picture, "tile", "")).replace("BGR;16", "")  # 5, 6 and 5 bits: an ordinary bitmap
    if picture.mode in _DEEP or ";16" in layout:
        raise DataError(f"{what} has 16 or more bits per channel (mode {picture.mode}): convert it to 8 bits")
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise DataError(f"{what} has {picture.n_frames} frames, and must have one: save the one that is meant")


def _converted(picture: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = picture.convert("RGBA")
        white = pillow().new("RGBA", over.size, (255, 255, 255, 255))
        picture = pillow().alpha_composite(white, over)
    return picture.convert(mode) if picture.mode != mode else picture.copy()


def pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [C, height, width]."""
    values = np.asarray(picture, dtype=np.uint8)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))
