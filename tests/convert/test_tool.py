"""tools/convert_checkpoint.py"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from megatron_lsh.commands import convert_checkpoint
from megatron_lsh.config import parse_args, validate
from megatron_lsh.convert import load_native
from tests.convert.helpers import assert_bit_equal, contents, hf_tensors
from tests.convert.tiny import hf_logits, load_pretrained, prompts, save_tiny

ROOT = Path(__file__).parents[2]


def test_there_and_back_through_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "hf", "mixtral", torch.bfloat16)
    way = ["hf", "native", "megatron", "native", "hf"]
    load = tmp_path / "hf"
    for number, (source, target) in enumerate(itertools.pairwise(way)):
        save = tmp_path / f"{number}_{target}"
        flags = ["--from", source, "--to", target, "--load", str(load), "--save", str(save)]
        if target == "megatron":
            flags += ["--target-tensor-parallel-size", "2", "--target-expert-parallel-size", "2", "--spelling", "te"]
        if source == "megatron":
            flags += ["--vocab-size", "67"]
        if target == "hf":
            flags += ["--max-shard-size", "20KB", "--reference", str(tmp_path / "hf")]
        assert convert_checkpoint.main(flags) == 0
        said = capsys.readouterr()
        assert "tensors, 0.000 GB, shapes and SHA-256 equal" in said.out and f"saved {save}" in said.out
        assert ("agree, largest difference of logits" in said.out) == ("hf" in (source, target))
        assert "converting 100.0%" in said.err and "verifying  100.0%" in said.err
        load = save
    assert_bit_equal(hf_tensors(load), hf_tensors(tmp_path / "hf"))
    assert len(list(load.glob("*.safetensors"))) > 2

    # The settings of a converted checkpoint are those of a training run.
    flags = [
        "--config",
        str(tmp_path / "0_native/release/config.json"),
        "--load",
        str(tmp_path / "0_native"),
        "--mock-data",
    ]
    cfg = validate(parse_args([*flags, "--micro-batch-size", "1", "--lr", "1e-4", "--train-iters", "1"]), 1)
    assert cfg.moe.num_experts == 4 and cfg.model.vocab_size == 67 and cfg.model.rotary_base == 1_000_000


def test_upcycling_dtype_and_no_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_tiny(tmp_path / "hf", "qwen3")
    flags = ["--from", "hf", "--load", str(tmp_path / "hf"), "--quiet", "--moe-use-upcycling", "--num-experts", "4"]
    assert convert_checkpoint.main([*flags, "--to", "native", "--save", str(tmp_path / "native")]) == 0
    assert "agree, largest difference of logits" in capsys.readouterr().out, "with the dense model"
    assert load_native(tmp_path / "native").cfg.moe.num_experts == 4
    assert convert_checkpoint.main([*flags, "--to", "hf", "--save", str(tmp_path / "moe"), "--no-verify"]) == 0
    said = capsys.readouterr()
    assert "WARNING: --no-verify" in said.err and "verified" not in said.out and "converting" not in said.err
    logits = hf_logits(load_pretrained(tmp_path / "moe"), prompts())
    torch.testing.assert_close(logits, hf_logits(dense, prompts()), rtol=0, atol=2e-5)
    assert (
        convert_checkpoint.main(
            [*flags, "--to", "hf", "--save", str(tmp_path / "half"), "--dtype", "fp16", "--no-logits"]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "SHA-256 equal" in said.out and "logits" not in said.out
    assert {value.dtype for value in hf_tensors(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--from", "hf", "--to", "native", "--load", str(tmp_path / "none"), "--save", str(tmp_path / "out")]
    assert convert_checkpoint.main(flags) == 1
    assert (
        capsys.readouterr().err
        == f"error: --load {tmp_path / 'none'} is not a folder: give the one that holds the checkpoint\n"
    )
    with pytest.raises(SystemExit):
        convert_checkpoint.main([*flags, "--num-experts", "4"])
    assert "--num-experts needs --moe-use-upcycling" in capsys.readouterr().err
    assert convert_checkpoint.main([*flags, "--max-shard-size", "big"]) == 1
    assert "--max-shard-size (big) must be a size such as 5GB" in capsys.readouterr().err
    assert contents(tmp_path) == []


@pytest.mark.slow
def test_killed(tmp_path: Path) -> None:
    """A conversion that is ended from outside leaves nothing, or nothing that looks finished; the next one succeeds."""
    save_tiny(
        tmp_path / "hf", "llama", hidden_size=256, intermediate_size=1024, vocab_size=20_000, num_hidden_layers=12
    )
    signals = (signal.SIGTERM, signal.SIGKILL)
    flags = ["--from", "hf", "--to", "native", "--load", str(tmp_path / "hf"), "--save"]
    command = [sys.executable, ROOT / "tools/convert_checkpoint.py", *flags]
    env, quiet = {**os.environ, "PYTHONPATH": str(ROOT)}, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ended = {s: subprocess.Popen([*command, tmp_path / s.name, "--no-verify"], env=env, **quiet) for s in signals}
    waiting = dict(ended)
    while waiting:
        for number, process in list(waiting.items()):
            if process.poll() is not None or (tmp_path / number.name / "release.incomplete").exists():
                waiting.pop(number).send_signal(number)
        time.sleep(0.002)
    assert all(process.wait(60) != 0 for process in ended.values())
    assert [path.name for path in (tmp_path / "SIGKILL").iterdir()] == ["release.incomplete"]
    assert not (tmp_path / "SIGTERM").exists()
    assert convert_checkpoint.main([*flags, str(tmp_path / "SIGKILL"), "--quiet"]) == 0
