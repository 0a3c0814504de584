"""IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist): plain or gzip-compressed.

Bytes 0 and 1 are zero, byte 2 is the type of the numbers (8: uint8), byte 3 the number of dimensions; their sizes follow as
big-endian int32, then the numbers in rows.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from megatron_lsh.errors import DataError

UINT8 = 8
LARGEST = 1 << 40
"""bytes; no file of labelled pictures is larger"""


def read_idx(path: Path, dimensions: tuple[int, ...]) -> np.ndarray:
    """The uint8 numbers of a file with one of these numbers of `dimensions`. Raises DataError for any other file."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, UINT8]) or content[3] not in dimensions:
        wanted = " or ".join(map(str, dimensions))
        raise DataError(
            f"{path} must be an IDX file of bytes in {wanted} dimension(s), and begins with {content[:4].hex(' ')}: "
            "give another file"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} is cut off in its header: fetch it again")
    shape = [int(size) for size in np.frombuffer(content[4:start], dtype=">u4")]
    count = 1
    for size in shape:
        count *= size
    if count > LARGEST or len(content) - start != count:
        raise DataError(
            f"{path} must hold {' x '.join(map(str, shape))} bytes, and holds {len(content) - start}: it was cut off or "
            "damaged, fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def write_idx(path: Path, values: np.ndarray) -> None:
    """`values` (uint8) as an IDX file; compressed if the name ends in .gz."""
    header = bytes([0, 0, UINT8, values.ndim]) + np.asarray(values.shape, dtype=">i4").tobytes()
    content = header + np.ascontiguousarray(values, dtype=np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
