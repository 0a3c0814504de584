"""tools/checkpoint_info.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lsh.commands import checkpoint_info
from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.toy import Trainer, manager


def test_it_says_what_is_there_and_whether_it_is_intact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_info.main([str(tmp_path)]) == 1
    run = Trainer(offline_context(device="cpu"))
    checkpoints = manager(run.ctx, tmp_path)
    for iteration in (1, 2):
        run.train(iteration)
        checkpoints.save(run.state(config={"model": {"seq_length": 8}}))
    capsys.readouterr()

    assert checkpoint_info.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "iter_0000002" in text and "iter_0000001" in text and "world_size=1" in text and "tokens seen" in text
    newest = tmp_path / "iter_0000002"
    assert checkpoint_info.main([str(newest), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["iteration"] == 2 and facts["tokens seen"] == 128 and facts["resumed from by default"]
    assert facts["tensors"]["model.column"] == "[12] float32"
    assert facts["holds"] == ["weights", "optimizer", "random states"]

    shard = newest / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert checkpoint_info.main([str(newest), "--quick"]) == 0
    assert checkpoint_info.main([str(newest)]) == 1
    assert "NOT VALID" in capsys.readouterr().out
    (newest / "manifest.json").write_text("{}")
    assert checkpoint_info.main([str(newest)]) == 1
