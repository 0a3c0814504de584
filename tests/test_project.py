"""Checks of the repository as a whole: the order of imports, sizes, scripts, and documents that name only what is there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_lsh
from megatron_lsh.config import BertConfig, ClassificationConfig, Config, T5Config, parse_args, validate
from megatron_lsh.config.compat import NO_EFFECT, REJECTED
from megatron_lsh.config.settings import settings_of, spellings_of
from megatron_lsh.config.swin import SwinConfig

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_lsh"

# What each room may import. errors, config, ops <- parallel, lsh <- moe <- models <- families <- plan <- training <- entry
# scripts; data/, checkpoint/, inference/, convert/ and observing/ hang off the side. ops/ and lsh/ are functions on tensors:
# neither configuration nor groups.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "ops": {"errors"},
    "parallel": {"errors", "config", "ops"},
    "lsh": {"errors", "ops"},
    "moe": {"errors", "config", "parallel", "ops", "lsh"},
    "models": {"errors", "config", "parallel", "ops", "lsh", "moe"},
    "data": {"errors", "config", "parallel"},
    "checkpoint": {"errors", "config", "parallel"},
    "inference": {"errors", "config", "parallel", "moe", "models", "checkpoint"},
    # builds models to fill them, and tokenizers to compare them
    "convert": {"errors", "config", "parallel", "ops", "lsh", "moe", "models", "data", "checkpoint", "inference"},
    "families": {"errors", "config", "parallel", "moe", "models", "data"},
    "plan": {"errors", "config", "parallel", "ops", "lsh", "moe", "models", "families"},
    "observing": {"errors", "config", "parallel", "moe"},
}
ALLOWED["training"] = set(ALLOWED)  # knows all others
ALLOWED["commands"] = set(ALLOWED)  # the programs: each is the command line of some room
SCRIPTS = [*ROOT.glob("pretrain_*.py"), *ROOT.glob("finetune_*.py")]
# Created by installing, training, testing or caching; a document may name paths inside them.
GENERATED = ("data/", "runs/", ".venv/", "build/")
MAX_LINES = 500


def source_files(*suffixes: str) -> list[Path]:
    """Files of the repository with one of these suffixes, without what is generated."""
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        here = Path(folder)
        at_root = here == ROOT
        subfolders[:] = [
            name
            for name in subfolders
            if not (at_root and name in ("data", "runs", "build", "dist", "checkpoints"))
            and name != "__pycache__"
            and (not name.startswith(".") or name in (".ci", ".github"))
        ]
        found += [here / name for name in names if name.endswith(suffixes)]
    return sorted(found)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, at any depth of nesting; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: write imports in full, not relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The entry of ALLOWED that a module is in, None outside the package; ``megatron_lsh`` itself is in none."""
    package, *parts = module.split(".")
    return parts[0] if package == "megatron_lsh" and parts and parts[0] in ALLOWED else None


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_run_one_way(room: str) -> None:
    files = [path for path in source_files(".py") if PACKAGE in path.parents]
    mine = [path for path in files if room_of(relative(path).removesuffix(".py").replace("/", ".")) == room]
    assert mine, f"no files in {room}"
    wrong = [
        f"{relative(path)} imports {module}"
        for path in mine
        for module in imported_modules(path)
        if (other := room_of(module)) is not None and other not in ALLOWED[room] | {room}
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_order() -> None:
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("room", ["ops", "lsh", "plan"])
def test_arithmetic_knows_no_process_group(room: str) -> None:
    for path in source_files(".py"):
        if PACKAGE / room not in path.parents:
            continue
        names = list(imported_modules(path))
        assert not [name for name in names if name.startswith("torch.distributed")], relative(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.distributed", f"{relative(path)}:{node.lineno}"


def test_no_global_statements() -> None:
    for path in source_files(".py"):
        if PACKAGE in path.parents:
            found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)]
            assert not found, f"{relative(path)} lines {found}: pass state in instead of keeping it in the module"


def test_no_file_is_too_long() -> None:
    long = {
        relative(path): lines
        for path in source_files(".py", ".sh", ".sbatch", ".cu", ".cpp")
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_entry_scripts_are_their_docstring_and_a_few_lines() -> None:
    for path in SCRIPTS:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), relative(path)
        code = [line for node in tree.body[1:] for line in ast.unparse(node).splitlines()]
        assert len(code) <= 8, f"{relative(path)}: what more there is to say belongs into megatron_lsh/families/"


def test_nobody_imports_a_script_or_looks_for_modules_elsewhere() -> None:
    scripts = {path.stem for path in SCRIPTS}
    for path in source_files(".py"):
        found = {module.split(".")[0] for module in imported_modules(path)} & scripts
        assert not found, f"{relative(path)} imports {found}: import megatron_lsh.families"
        if ROOT / "tests" not in path.parents:
            assert "sys.path" not in path.read_text(), f"{relative(path)} changes sys.path"


def test_every_room_has_tests() -> None:
    for room in set(ALLOWED) - {"errors"}:
        assert list((ROOT / "tests" / room.split(".")[0]).glob("test_*.py")), f"tests/{room} has no tests"


# Scripts


def shell_scripts() -> list[Path]:
    return [*source_files(".sh", ".sbatch"), ROOT / ".ci" / "run"]


def test_shell_scripts_parse_and_can_be_run() -> None:
    for path in shell_scripts():
        subprocess.run(["bash", "-n", path], check=True)
        if path.read_text().startswith("#!"):
            assert os.access(path, os.X_OK), f"{relative(path)} is not executable"


MODELS = {"gpt": Config, "bert": BertConfig, "t5": T5Config, "swin": SwinConfig}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("script", "world_size"), [("1gpu", 1), ("2gpu", 2), ("4gpu", 4), ("8gpu", 8), ("multinode", 16)]
)
def test_launchers_start_valid_runs(script: str, world_size: int, model: str, tmp_path: Path) -> None:
    """What the launchers hand to torchrun passes every check that needs no data."""
    env = {**os.environ, "TORCHRUN": "echo", "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    env |= {
        "RUN_DIR": str(tmp_path / "run"),
        "DATA_PATH": "corpus",
        "TOKENIZER_MODEL": "tokenizer.model",
        "MODEL": model,
    }
    command = [ROOT / "scripts" / f"pretrain_moe_{script}.sh", "--train-iters", "77"]
    words = subprocess.run(command, env=env, check=True, text=True, capture_output=True, cwd=tmp_path).stdout.split()
    entry = words.index(f"pretrain_{model}_moe.py")
    assert "--nproc-per-node" in words[:entry]
    cfg = validate(parse_args(words[entry + 1 :], MODELS[model]), world_size)
    assert cfg.training.train_iters == 77, "further flags must win"
    assert cfg.moe.num_experts and cfg.moe.num_experts % cfg.parallel.expert_model_parallel_size == 0
    assert cfg.checkpoint.save == cfg.checkpoint.load


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_model_that_is_not_there_is_refused_in_one_line() -> None:
    for command in (["make", "-C", ROOT, "pretrain", "MODEL=vit"], [ROOT / "scripts" / "pretrain_readme.sh"]):
        process = subprocess.run(command, env={**os.environ, "MODEL": "vit"}, text=True, capture_output=True)
        assert process.returncode != 0
        (line,) = [line for line in process.stderr.splitlines() if "Makefile" in line or "ERROR" in line]
        assert "MODEL=vit must be gpt, bert, t5 or swin" in line


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    printed = subprocess.run(["make", "-s", "-C", ROOT], check=True, text=True, capture_output=True).stdout
    for target in set(targets.split()) - {"help"}:
        assert f"make {target} " in printed, f"make help does not list {target}"


# Documents


def documents() -> list[Path]:
    return source_files(".md")


def test_documents_link_to_what_is_there() -> None:
    for document in documents():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (document.parent / target).exists(), (
                    f"{relative(document)} links to {target}, which is not there"
                )


def test_documents_name_files_that_are_there() -> None:
    """Every `path/to/file.ext` in backticks is a file of this repository (or of the package)."""
    for document in documents():
        for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|sbatch|md|toml|cu|cpp))`", document.read_text()):
            if not path.startswith(GENERATED):
                candidates = [ROOT / path, PACKAGE / path, document.parent / path]
                assert any(c.exists() for c in candidates), f"{relative(document)} names {path}, which is not there"


def test_documents_name_flags_that_exist() -> None:
    """Flags in backticks or code blocks are ours, Megatron-LM's as we know it, those of a tool here, or a launcher's."""
    launchers = {"--nproc-per-node", "--nodes", "--gpus-per-node", "--signal", "--logdir", "--help", "--config"}
    launchers |= {"--rdzv-backend", "--rdzv-endpoint", "--prefix"}  # torchrun's, and its reader's of dumps
    launchers |= {"--model", "--model_args", "--include_path", "--output_path"}  # lm_eval's
    known = launchers | {*NO_EFFECT, *REJECTED}
    for config_class in (Config, BertConfig, T5Config, ClassificationConfig, SwinConfig):
        known |= {spelling.flag for spelling in spellings_of(settings_of(config_class)).values()}
    for path in source_files(".py"):
        known |= set(re.findall(r'"(--[a-z][\w-]+)"', path.read_text()))
    for document in documents():
        code = re.findall(r"`[^`]+`|^    .*$", document.read_text(), re.MULTILINE)
        unknown = {flag for text in code for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)} - known
        assert not unknown, f"{relative(document)} names unknown flags: {sorted(unknown)}"


def tree_of(text: str) -> list[str]:
    """Paths of the annotated file tree, the indented block that holds ``megatron_lsh/``.

    A line is four spaces, two more per folder it lies in, a name, and an annotation at least two spaces further on.
    Lines that start beyond column 20 continue an annotation.
    """
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    tree = next((block for block in blocks if re.search(r"^    megatron_lsh/", block, re.MULTILINE)), "")
    paths: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > 20:
            continue
        name = line.split()[0]
        folders = [*folders[: (indent - 4) // 2], name]
        paths.append("".join(folders))
    return paths


def test_readme_tree_is_there_and_complete() -> None:
    paths = tree_of((ROOT / "README.md").read_text())
    absent = [path for path in paths if not (ROOT / path).exists() and not path.startswith(GENERATED)]
    assert not absent
    named = {path.rstrip("/") for path in paths}
    rooms = [room for room in ALLOWED if "." not in room]
    missing = [
        f"megatron_lsh/{room}" for room in rooms if not named & {f"megatron_lsh/{room}", f"megatron_lsh/{room}.py"}
    ]
    assert not missing, f"README's tree lacks {missing}"


def test_changelog_and_licence() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{megatron_lsh.__version__}]" in changelog
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_the_reading_order_tells_how_long_files_are() -> None:
    named = re.findall(r"`([\w/]+\.py)`\s+\((\d+)\)", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 15
    for name, lines in named:
        now = len((PACKAGE / name).read_text().splitlines())
        assert abs(now - int(lines)) <= max(20, now // 5), (
            f"docs/architecture.md: {name} has {now} lines now, not {lines}"
        )


def test_every_benchmark_is_in_the_table_of_instruments() -> None:
    table = (ROOT / "docs" / "instruments.md").read_text()
    runnable = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert runnable and not [path.stem for path in runnable if f"benchmarks.{path.stem}`" not in table]
