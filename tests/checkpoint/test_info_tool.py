"""tools/checkpoint_info.py"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.toy import Trainer, manager


def load_tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "checkpoint_info.py"
    spec = importlib.util.spec_from_file_location("checkpoint_info", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_says_what_is_there_and_whether_it_is_intact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool()
    assert tool.main([str(tmp_path)]) == 1
    run = Trainer(offline_context(device="cpu"))
    checkpoints = manager(run.ctx, tmp_path)
    for iteration in (1, 2):
        run.train(iteration)
        checkpoints.save(run.state(config={"model": {"seq_length": 8}}))
    capsys.readouterr()

    assert tool.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "iter_0000002" in text and "iter_0000001" in text and "world_size=1" in text and "tokens seen" in text
    newest = tmp_path / "iter_0000002"
    assert tool.main([str(newest), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["iteration"] == 2 and facts["tokens seen"] == 128 and facts["resumed from by default"]
    assert facts["tensors"]["model.column"] == "[12] float32"
    assert facts["holds"] == ["weights", "optimizer", "random states"]

    shard = newest / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert tool.main([str(newest), "--quick"]) == 0
    assert tool.main([str(newest)]) == 1
    assert "NOT VALID" in capsys.readouterr().out
    (newest / "manifest.json").write_text("{}")
    assert tool.main([str(newest)]) == 1
