"""Peak memory of conversions of a large random checkpoint.

    python -m benchmarks.convert_memory [--gigabytes 4] [--folder /tmp]

Writes a random bf16 Mixtral of that size, converts it to native, back, and to Megatron-LM (verified, without running the
models), each in a process of its own. Reports what a process that has imported everything occupies, and how much more it
ever occupied. Removes all files.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, table, write_result
from megatron_lsh.convert import Checks, load_hf, load_native, save_hf, save_megatron, save_native
from megatron_lsh.convert.hf import hub_shapes
from megatron_lsh.convert.hf_config import read_hf_config
from megatron_lsh.convert.safetensors import SafetensorsWriter
from megatron_lsh.convert.source import TensorSpec, model_shapes

CONVERSIONS = ("hf to native", "native to hf", "native to megatron, TP 2 x EP 2")
LAYER_BYTES = 2 * (8 * 3 * 2048 * 5632 + 2 * 2048 * 2048 + 2 * 2048 * 512)
CONFIG = {
    "model_type": "mixtral", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 4096,
    "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
}  # fmt: skip


def make_checkpoint(folder: Path, nbytes: int) -> int:
    """A Mixtral of about that size, its values random; returns its size."""
    folder.mkdir()
    config = {**CONFIG, "num_hidden_layers": max(1, round((nbytes - 4 * 32000 * 2048) / LAYER_BYTES))}
    (folder / "config.json").write_text(json.dumps(config))
    family, cfg, _ = read_hf_config(config, "config.json")
    specs = {
        name: TensorSpec(part, torch.bfloat16)
        for native, shape in model_shapes(cfg).items()
        for name, part in hub_shapes(family, native, shape, cfg).items()
    }
    with SafetensorsWriter(folder, specs, 2 * 10**9) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.randn(spec.shape, dtype=torch.bfloat16))
        writer.finish()
    return sum(spec.nbytes for spec in specs.values())


def convert(number: int, root: Path) -> None:
    """One conversion, in a process of its own. Prints seconds, memory at the start and at the peak, in bytes."""
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checks = Checks(logits=False, say=lambda text: None)
    start = time.monotonic()
    if number == 0:
        save_native(load_hf(root / "hf"), root / "native", checks=checks)
    elif number == 1:
        save_hf(load_native(root / "native"), root / "back", checks=checks)
    else:
        save_megatron(load_native(root / "native"), root / "megatron", tp=2, ep=2, checks=checks)
    seconds = time.monotonic() - start
    print(json.dumps([seconds, before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def measure(root: Path) -> list[dict[str, Any]]:
    """Every conversion of ROOT/hf."""
    results = []
    for number, name in enumerate(CONVERSIONS):
        command = [sys.executable, "-m", "benchmarks.convert_memory", "--one", str(number), "--folder", str(root)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        seconds, before, peak = json.loads(output.splitlines()[-1])
        results.append({"conversion": name, "seconds": seconds, "at_rest_bytes": before, "peak_bytes": peak})
        print(f"{name}: {seconds:.0f} s", flush=True)
        if number > 0:
            shutil.rmtree(root / ("back" if number == 1 else "megatron"))
    return results


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="needs four times the size")
    parser.add_argument("--name", default="convert_memory", help="of the result file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one is not None:
        convert(arguments.one, Path(arguments.folder))
        return
    root = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=arguments.folder))
    try:
        size = make_checkpoint(root / "hf", int(arguments.gigabytes * 1e9))
        results = measure(root)
    finally:
        shutil.rmtree(root)
    header = [f"{size / 1e9:.2f} GB in bf16", "seconds", "at rest, GB", "peak above it, GB"]
    rows = [
        [
            r["conversion"],
            f"{r['seconds']:.0f}",
            f"{r['at_rest_bytes'] / 1e9:.2f}",
            f"{(r['peak_bytes'] - r['at_rest_bytes']) / 1e9:.2f}",
        ]
        for r in results
    ]
    print(f"\n{table(header, rows)}\n")
    path = write_result(arguments.name, {"checkpoint_bytes": size, "conversions": results})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
