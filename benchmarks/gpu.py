"""Everything to run on a GPU, in parts of under ten minutes each: ``make gpu``, or ``make gpu PART=layer``.

Each part's outcome, its seconds and the end of its output go to benchmarks/results/gpu_PART.json beside what its benchmark
writes; the last lines are a summary to paste. ``--dry-run`` does all of it on a CPU at a small size, but what needs CUDA.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import ROOT, machine, table, write_result

Command = list[str]
SECONDS = 600
#: Folders with tests that need a GPU.
TESTED = ("tests/kernels", "tests/moe", "tests/lsh", "tests/models", "tests/inference", "tests/training")
_OPS = "plan or regroup or nearest or segment or hash or combine or members or differences"
_MODEL = [
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--num-attention-heads",
    "8",
    "--num-experts",
    "8",
    "--moe-router-topk",
    "2",
    "--swiglu",
    "--disable-bias-linear",
    "--position-embedding-type",
    "rope",
    "--normalization",
    "RMSNorm",
    "--moe-token-dispatcher-type",
    "lsh",
    "--lr",
    "3e-4",
]


def python(*words: str) -> Command:
    return [sys.executable, *words]


def build(dry: bool) -> list[Command]:
    show = python("-c", "from megatron_lsh.ops.library import STATUS; print(STATUS)")
    return [show] if dry else [*(python("kernels/build.py", kind) for kind in ("cpu", "cuda")), show]


def tests(dry: bool) -> list[Command]:
    pytest = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTED)
    return [[*pytest, "--collect-only"] if dry else pytest]


def sanitizers(dry: bool) -> list[Command]:
    tool = shutil.which("compute-sanitizer")
    if dry or tool is None:
        return [python("-c", "print('no compute-sanitizer: nothing to do')")]
    under = ["--kernel-regex", "kns=megatron_lsh", "--error-exitcode", "9"]
    files = ("tests/kernels/test_ops.py", "tests/kernels/test_differences.py")
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files, "-k", _OPS)
    return [[tool, "--tool", kind, *under, *run] for kind in ("memcheck", "racecheck", "synccheck")]


def kernels(dry: bool) -> list[Command]:
    small = ["--device", "cpu", "--rows", "256", "--hidden", "32", "--repeats", "2"]
    full = ["--device", "cuda", "--repeats", "9"]
    return [python("-m", "benchmarks.kernels", "--name", "gpu_kernels_stages", *(small if dry else full))]


def layer(dry: bool) -> list[Command]:
    small = ["--device", "cpu", "--shape", "small", "--repeats", "1"]
    full = ["--device", "cuda", "--shape", "small", "mixtral", "fine"]
    return [python("-m", "benchmarks.gpu_layer", "--name", "gpu_layer_shapes", *(small if dry else full))]


def restoration(dry: bool) -> list[Command]:
    small = ["--device", "cpu", "--shape", "small", "--blocks", "16", "--repeats", "1"]
    full = ["--device", "cuda", "--shape", "mixtral", "fine"]
    return [python("-m", "benchmarks.restoration", "--name", "gpu_restoration_forms", *(small if dry else full))]


def training(dry: bool) -> list[Command]:
    """The loss with kernels and without, and steps of a model of 1.9 billion parameters with their MFU, exact and LSH."""

    def run(kernels: str, *size: str) -> Command:
        return ["env", f"MEGATRON_LSH_KERNELS={kernels}", *python("pretrain_gpt_moe.py", *_MODEL, *size)]

    def size(layers: int, hidden: int, ffn: int, seq: int, batch: int, steps: int, vocab: int) -> list[str]:
        return (
            f"--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --seq-length {seq} "
            f"--max-position-embeddings {seq} --micro-batch-size {batch} --global-batch-size {batch} "
            f"--train-iters {steps} --log-interval {max(steps // 6, 1)} --vocab-size {vocab}"
        ).split()  # fmt: skip

    if dry:
        return [run("1", *size(1, 32, 64, 16, 2, 2, 64))]
    parity = size(4, 512, 1024, 512, 8, 60, 8192)
    billion = [*size(12, 2048, 2816, 2048, 8, 18, 32000), "--bf16", "--eval-iters", "0"]
    exact = ["--moe-token-dispatcher-type", "alltoall"]
    return [run("1", *parity, "--bf16"), run("0", *parity, "--bf16"), run("1", *billion, *exact), run("1", *billion)]


PARTS: dict[str, Callable[[bool], list[Command]]] = {
    "build": build, "tests": tests, "sanitizers": sanitizers, "kernels": kernels, "layer": layer,
    "restoration": restoration, "training": training,
}  # fmt: skip


def run_part(name: str, dry: bool) -> tuple[bool, float, str]:
    """Whether all commands of a part succeeded within its time, its seconds, and what they printed."""
    started, output, passed = time.monotonic(), "", True
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    for command in PARTS[name](dry):
        left = SECONDS - (time.monotonic() - started)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(left, 1)
            )
        except subprocess.TimeoutExpired as error:
            return False, time.monotonic() - started, f"{output}{error.stdout or ''}\nnot done after {SECONDS} s"
        output += done.stdout + done.stderr
        passed &= done.returncode in (0, 5)  # pytest found no test: no GPU
    return passed, time.monotonic() - started, output


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at a small size")
    arguments = parser.parse_args(words)
    if arguments.dry_run:
        os.environ["MEGATRON_LSH_RESULTS"] = "build/gpu_dry_run"  # its figures are no results
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"part ({unknown[0]}) must be one of {', '.join(PARTS)}")
    rows, failed = [], []
    for name in arguments.parts or list(PARTS):
        passed, seconds, output = run_part(name, arguments.dry_run)
        print(f"== {name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s\n{output}", flush=True)
        written = write_result(f"gpu_{name}", {"passed": passed, "seconds": seconds, "output": output[-20000:]})
        rows.append([name, "passed" if passed else "FAILED", f"{seconds:.0f}", Path(written).name])
        failed += [] if passed else [name]
    facts = machine()
    print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}, commit {facts['commit']}")
    print(table(["part", "outcome", "seconds", "file"], rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
