"""What an installation brings: a wheel that needs no checkout, and for the core no package that is not needed to train."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.commands import names
from tests.commands.test_container import instructions

ROOT = Path(__file__).parents[2]
# What training needs. Whoever adds a package here makes everybody install it: an extra does for most.
CORE = {"torch", "numpy", "pyyaml", "safetensors", "sentencepiece", "tokenizers", "tensorboard", "matplotlib"}
MODULES = (CORE - {"pyyaml"}) | {"yaml"}


def project() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_core_pulls_in_what_training_needs_and_nothing_else() -> None:
    assert {re.split(r"[^\w-]", requirement)[0] for requirement in project()["dependencies"]} == CORE
    extras = project()["optional-dependencies"]
    assert not CORE & {re.split(r"[^\w-]", requirement)[0] for extra in extras.values() for requirement in extra}


def imported_on_import(body: list[ast.stmt]) -> Iterator[str]:
    """Packages that importing a module imports: what stands in functions, or under TYPE_CHECKING, waits."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, (ast.ClassDef, ast.With, ast.Try)):
            yield from imported_on_import(node.body)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from imported_on_import(node.body + node.orelse)


def test_importing_any_module_needs_no_more_than_the_core() -> None:
    known = MODULES | {"megatron_lsh"} | sys.stdlib_module_names
    for path in (ROOT / "megatron_lsh").rglob("*.py"):
        more = set(imported_on_import(ast.parse(path.read_text(encoding="utf-8")).body)) - known
        assert not more, f"{path.relative_to(ROOT)} imports {more}: import it in the function that uses it"


EVERY_COMMAND = """
import contextlib, io, json, sys
import megatron_lsh
from megatron_lsh.commands import names, run
shown = {}
for name in names():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run([name, "--help"])
    shown[name] = out.getvalue()
print(json.dumps({"file": megatron_lsh.__file__, "shown": shown}))
"""
TINY = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --mock-data "
    "--vocab-size 64 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3 --num-experts 2 --save run "
    "--moe-token-dispatcher-type lsh --device cpu --metrics-jsonl metrics.jsonl --eval-iters 1 --log-interval 1"
)


@pytest.mark.slow
def test_a_wheel_of_what_the_container_copies_runs_everything_from_an_empty_folder(tmp_path: Path) -> None:
    """Built, installed and started as by pip, with the packages of this environment; a compiler that makes empty files."""
    source, target, away = tmp_path / "source", tmp_path / "target", tmp_path / "away"
    away.mkdir()
    for words in [words for name, words in instructions((ROOT / "Containerfile").read_text()) if name == "COPY"]:
        *files, place = words.split()
        for file in files:
            to = source / (place if len(files) == 1 and not place.endswith("/") else Path(place) / Path(file).name)
            to.parent.mkdir(parents=True, exist_ok=True)
            without = shutil.ignore_patterns("*.so", "__pycache__", "_kernels.txt")
            shutil.copytree(ROOT / file, to, ignore=without) if (ROOT / file).is_dir() else shutil.copy(ROOT / file, to)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation"]
    env = {**os.environ, "CXX": "/bin/false"}
    done = subprocess.run([*pip, "--target", target, source], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (target / "megatron_lsh" / "py.typed").is_file() and (target / "bin" / "megatron-lsh").is_file()

    env = {**os.environ, "PYTHONPATH": str(target), "MEGATRON_LSH_KERNELS": "0", "OMP_NUM_THREADS": "1"}
    every = subprocess.run([sys.executable, "-c", EVERY_COMMAND], cwd=away, env=env, text=True, capture_output=True)
    assert every.returncode == 0, every.stderr
    found = json.loads(every.stdout)
    assert found["file"].startswith(str(target)) and list(found["shown"]) == names()
    assert all("usage:" in shown for shown in found["shown"].values())

    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1"
    for words in (
        [*launcher.split(), "-m", "megatron_lsh", "pretrain_gpt_moe", *TINY.split()],
        [sys.executable, target / "bin" / "megatron-lsh", "checkpoint_info", "run"],
    ):
        done = subprocess.run(words, cwd=away, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert "iter_0000002" in done.stdout and "valid" in done.stdout
    assert [json.loads(line)["iteration"] for line in (away / "metrics.jsonl").read_text().splitlines()][:2] == [1, 2]
