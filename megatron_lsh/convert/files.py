"""Small JSON files, read with a remedy and written for good."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lsh.checkpoint import saved
from megatron_lsh.errors import CheckpointError, DamagedCheckpoint


def read_json(path: Path, remedy: str = "download or copy it again") -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, which ends with the `remedy`."""
    try:
        return saved.read_json(path)
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error}: {remedy}") from None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a new file, which is on the disk afterwards. Raises OSError."""
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(json.dumps(document, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
