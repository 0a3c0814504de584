"""Say what is in a checkpoint: layout, step, tokens seen, sizes, and whether every file is as it was written.

    python -m megatron_lsh checkpoint_info SAVE                   all checkpoints of a run
    python -m megatron_lsh checkpoint_info SAVE/iter_0000100      one of them
    python -m megatron_lsh checkpoint_info --tensors SAVE/iter_0000100

Exits with 1 if there is no checkpoint, or if one is damaged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_lsh.checkpoint.folders import read_tracker
from megatron_lsh.checkpoint.inspection import CheckpointInfo, inspect, inspect_folder
from megatron_lsh.checkpoint.manifest import MANIFEST, ManifestError, read_manifest
from megatron_lsh.checkpoint.metadata import read_metadata
from megatron_lsh.config.serialize import positions_per_sample
from megatron_lsh.config.tool_flags import ToolParser, a_path
from megatron_lsh.errors import CheckpointError, exit_status


def main(arguments: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=a_path, help="a save folder, or one checkpoint in it")
    parser.add_argument("--quick", action="store_true", help="check the manifest and file sizes only, not the SHA-256")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with shape and type")
    parser.add_argument("--json", action="store_true", help="one JSON object per checkpoint")
    found: list[CheckpointInfo] = []

    def work() -> None:
        args = parser.parse_args(arguments)
        found.extend(find(args.folder, hashes=not args.quick))
        if not found:
            raise CheckpointError(f"{args.folder} holds no checkpoint: give a --save folder, or one checkpoint in it")
        for info in found:
            facts = describe(info)
            if args.tensors and info.valid:
                facts["tensors"] = tensors(info.folder)
            print(json.dumps(facts) if args.json else text(facts))

    return exit_status(work) or int(not all(info.valid for info in found))


def find(folder: Path, hashes: bool) -> list[CheckpointInfo]:
    """The checkpoint `folder`, or all checkpoints in it."""
    if not (folder / MANIFEST).exists():
        return inspect(folder, hashes=hashes)
    try:
        iteration = read_manifest(folder).iteration
    except ManifestError:
        iteration = -1  # inspect_folder says what is wrong
    tracker = read_tracker(folder.parent)
    tracked = tracker is not None and tracker.iteration == iteration
    return [inspect_folder(folder, iteration, tracked=tracked, hashes=hashes)]


def describe(info: CheckpointInfo) -> dict[str, Any]:
    """Everything worth knowing, as plain JSON."""
    facts: dict[str, Any] = {
        "folder": str(info.folder),
        "iteration": info.iteration,
        "status": "valid" if info.valid else f"NOT VALID: {info.problem}",
        "verified": "manifest, sizes and SHA-256" if info.verified else "manifest and sizes",
        "resumed from by default": info.tracked,
    }
    if info.manifest is None:
        return facts
    manifest = info.manifest
    samples = info.progress.get("consumed_samples")
    sequence = positions_per_sample(info.config)
    tokens = info.progress.get("consumed_tokens")
    if tokens is None and samples is not None and sequence is not None:
        tokens = samples * sequence
    facts |= {
        "created": manifest.created,
        "layout": manifest.layout,
        "samples seen": samples,
        "tokens seen": tokens,
        "progress": info.progress,
        "holds": ["weights"] + ["optimizer"] * manifest.has_optimizer + ["random states"] * manifest.has_rng,
        "bytes": manifest.total_bytes,
        "files": {entry.name: entry.size for entry in manifest.files},
        "torch": manifest.torch_version,
        "megatron_lsh": manifest.package_version,
        "config_sha256": manifest.config_sha256,
        "extra": info.extra,
    }
    return facts


def tensors(folder: Path) -> dict[str, str]:
    """Name -> shape and type of every tensor."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = read_metadata(folder).state_dict_metadata
    return {
        key: f"{list(entry.size)} {str(entry.properties.dtype).removeprefix('torch.')}"
        for key, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata)
    }


def text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['folder']}"]
    for key, value in facts.items():
        if key in ("folder", "files", "tensors") or value is None or value == {}:
            continue
        if key == "bytes":
            value = f"{value:,} in {len(facts['files'])} files"
        elif isinstance(value, dict):
            value = ", ".join(f"{name}={item}" for name, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"  {key:<24} {value}")
    for part in ("files", "tensors"):
        if part in facts:
            lines.append(f"  {part}")
            for name, value in facts[part].items():
                lines.append(f"    {name:<70} {value if isinstance(value, str) else f'{value:,}'}")
    return "\n".join(lines)
