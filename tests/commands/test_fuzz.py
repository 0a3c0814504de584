"""Any words behind the tools' flags, and any file where they expect another: done, or a reason in one line; no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from importlib import import_module
from pathlib import Path

import pytest

from megatron_lsh.commands import names
from tests.fuzzing import SEED, cases

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster_4x8_h100.yaml"
FILES: dict[str, bytes] = {
    "cluster.yaml": CLUSTER.read_bytes(),
    "empty": b"",
    "bytes": bytes(range(256)) * 4,
    "nul": b"a\0b\n",
    "list.json": b"[1,2]",
    "deep.json": b"[" * 3000,
    "text.txt": b"hello world\nline two\n",
    "one.jsonl": b'{"text": "a b", "label": "x"}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "number.jsonl": b'{"text": 5}\n',
    "bad.jsonl.gz": b"\x1f\x8b\x08\0\0\0\0\0\0\3xx",
    "bad.parquet": b"PAR1xxxxPAR1",
    "save/latest_checkpointed_iteration.txt": b"release",
    "save/release/config.json": b"[]",
    "hf/config.json": b'{"model_type": ["llama"]}',
    "list/config.json": b"[]",
    "tokenizer/tokenizer.json": b'{"model": 5}',
    "library/a.py": b"import os\n" * 40,
    "run/metrics.jsonl": b'{"iteration": 1, "lm_loss": 2.0}\nnonsense\n',
}
PATHS = [*FILES, "save", "save/release", "hf", "list", "tokenizer", "library", "run", "loop", "nowhere"]
PATHS += ["/dev/null", "/proc/1/mem", "", " ", "\0", "x" * 5000, "text.txt/x", "*.json", "\udcff", "\ud800"]
OUTPUTS = ["out", "out/deep", "save", "text.txt", "text.txt/x", "/proc/x", "/dev/full", "", "loop", "\0"]
INTEGERS = ["0", "-1", "1", "2", "300", "9" * 25, "9" * 5000, "1.5", "x", "", "nan"]
NUMBERS = ["0", "-1", "nan", "inf", "-inf", "1e400", "1e308", "x", "", "0.5", "0.01"]
TOKENIZERS = [
    "NullTokenizer",
    "ByteTokenizer",
    "GPTSentencePieceTokenizer",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    "x",
]
TEXTS = ["a", "", "\n", "\ud800", "é"]

Flags = dict[str, list[str] | None]
"""flag -> words to choose from, of a positional argument under another name; None for a switch"""
MODEL: Flags = {"--ckpt-step": INTEGERS, "--tokenizer-type": TOKENIZERS, "--tokenizer-model": PATHS, "--bf16": None}
TOOLS: dict[str, tuple[Flags, Flags]] = {
    "checkpoint_info": ({"folder": PATHS}, {"--quick": None, "--tensors": None, "--json": None}),
    "convert_checkpoint": (
        {"--from": ["hf", "native", "megatron", "microsoft", "timm"], "--to": ["hf", "native", "megatron", "x"]}
        | {"--load": PATHS, "--save": OUTPUTS},
        dict.fromkeys(
            ("--max-position-embeddings", "--image-size", "--vocab-size", "--seed", "--num-experts"), INTEGERS
        )
        | {"--ckpt-step": INTEGERS, "--reference": PATHS, "--moe-use-upcycling": None, "--no-verify": None}
        | {"--max-shard-size": ["5GB", "x", "0", "1e9", "-1", "9" * 400, "nan", "1.2.3"]},
    ),
    "generate": (
        {"--load": PATHS},
        MODEL
        | {"--prompt": TEXTS, "--prompt-file": PATHS, "--top-k": INTEGERS, "--temperature": NUMBERS}
        | {"--max-new-tokens": INTEGERS, "--seed": INTEGERS, "--top-p": NUMBERS},
    ),
    "plan": (
        {"--cluster": [*PATHS, "cluster.yaml", "cluster.yaml", "cluster.yaml"]},
        dict.fromkeys(("--nodes", "--top", "--chunks", "--num-layers", "--hidden-size", "--num-experts"), INTEGERS)
        | {"--rates": NUMBERS, "--wires": ["fp8", "model", "x", ""], "--model": ["gpt", "bert", "t5", "swin", "x"]}
        | {"--out": OUTPUTS, "--global-batch-size": INTEGERS, "--bf16": None},
    ),
    "perplexity": ({"--load": PATHS, "--file": PATHS}, MODEL | {"--stride": INTEGERS}),
    "see_merges": (
        {"--load": PATHS, "--file": PATHS, "--out": OUTPUTS},
        MODEL | {"--sequences": INTEGERS, "--lsh-target-rate": NUMBERS},
    ),
    "prepare_20newsgroups": ({"--wheel": PATHS, "--output-dir": OUTPUTS}, {"--valid-share": NUMBERS}),
    "prepare_images": ({"--wheel": PATHS, "--output-dir": OUTPUTS}, {}),
    "prepare_stdlib_corpus": (
        {"--output-dir": OUTPUTS, "--stdlib": PATHS},
        {"--max-mb": NUMBERS, "--vocab-size": INTEGERS, "--tokenizer-mb": NUMBERS, "--force": None},
    ),
    "preprocess_data": (
        {
            "--input": PATHS,
            "--output-prefix": OUTPUTS,
            "--tokenizer-type": TOKENIZERS,
            "--workers": ["1", "1", "0", "x"],
        },
        dict.fromkeys(("--tokenizer-model", "--vocab-file", "--merge-file"), PATHS)
        | dict.fromkeys(("--vocab-size", "--vocab-extra-ids", "--log-interval"), INTEGERS)
        | {
            "--append-eod": None,
            "--split-sentences": None,
            "--lang": ["en", "xx", ""],
            "--json-keys": ["text", "label", ""],
        },
    ),
    "report": ({"run": PATHS}, {"--out": OUTPUTS, "--names": TEXTS, "--title": TEXTS}),
}


def words(tool: str, rng: random.Random) -> list[str]:
    """Its required flags, most of the time, and some others."""
    required, others = TOOLS[tool]
    chosen = [flag for flag in required if rng.random() < 0.96]
    chosen += rng.sample(list(others), rng.randrange(min(4, len(others)) + 1))
    line: list[str] = []
    for flag in chosen:
        values = {**required, **others}[flag]
        line += [flag] if flag.startswith("--") else []
        line += [rng.choice(values)] if values is not None else []
    return line


def test_every_tool_with_flags_of_its_own_is_tried() -> None:
    runs = {
        name for name in names() if name.startswith(("pretrain_", "finetune_", "profile_"))
    }  # tests/config/test_fuzz.py
    assert set(TOOLS) == set(names()) - runs


def test_any_command_line_is_done_or_told_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.symlink("loop", "loop")
    for number in range(cases(60)):
        rng = random.Random(f"{SEED} {number}")
        tool = rng.choice(list(TOOLS))
        line = words(tool, rng)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = import_module(f"megatron_lsh.commands.{tool}").main(line)
            except SystemExit as end:
                status = end.code
            except Exception as error:
                raise AssertionError(f"{tool} {json.dumps(line)[:1000]}") from error
        said = f"{tool} {json.dumps(line)[:1000]}: {status} {err.getvalue()[-1000:]}"
        assert "Traceback" not in err.getvalue(), said
        assert status == 0 or "error: " in err.getvalue() or "NOT VALID" in out.getvalue(), said
