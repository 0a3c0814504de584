"""JSON and back, across versions of the package, and what is printed at start-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.config import Config, describe, from_dict, to_dict, to_json, to_saved
from megatron_lsh.config.settings import Setting, settings_of
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import small

SETTINGS = settings_of(Config)


def values_of(setting: Setting) -> st.SearchStrategy:
    kinds = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0),  # no setting is -0
        str: st.sampled_from(setting.choices)
        if setting.choices
        else st.text(st.characters(codec="utf-8", min_codepoint=1)),
    }
    values = st.lists(kinds[setting.kind]) if setting.is_list else kinds[setting.kind]
    return st.none() | values if setting.optional else values


#: Some settings with values: to draw all of them for every example takes ten times as long.
ANY_CONFIG = st.lists(
    st.sampled_from(sorted(SETTINGS)).flatmap(lambda name: st.tuples(st.just(name), values_of(SETTINGS[name]))),
    min_size=1,
    max_size=40,
).map(dict)


@settings(deadline=None, max_examples=30)
@given(ANY_CONFIG)
def test_round_trip(values: dict[str, Any]) -> None:
    cfg = Config()
    for name, value in values.items():
        SETTINGS[name].set(cfg, value)
    text = to_json(cfg)
    assert from_dict(json.loads(text)) == cfg
    assert to_json(from_dict(json.loads(text))) == text


def test_saved_paths_are_full_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a saved configuration stands in another folder. Names on the hub, and weights, stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").touch()
    cfg = Config()
    cfg.data.data_path = ["0.3", "a/corpus", "1e-1", "/b"]
    cfg.data.tokenizer_model, cfg.data.vocab_file, cfg.checkpoint.save = "gpt2", "vocab.txt", "runs/x"
    saved = to_saved(cfg)["config"]
    assert saved["data"]["data_path"] == ["0.3", f"{tmp_path}/a/corpus", "1e-1", "/b"]
    assert (saved["data"]["tokenizer_model"], saved["data"]["vocab_file"]) == ("gpt2", f"{tmp_path}/vocab.txt")
    assert saved["checkpoint"]["save"] == f"{tmp_path}/runs/x" and saved["checkpoint"]["load"] is None
    assert cfg.checkpoint.save == "runs/x"


def test_saved_paths_of_what_a_run_writes_and_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    cfg = SwinConfig()
    written = {name: f"out/{name}" for name in ("wandb_save_dir", "flight_recorder_dump_path", "memory_snapshot_path")}
    for name, path in written.items():
        setattr(cfg.logging, name, path)
    cfg.images.picture_sheet = "pictures.png"
    cfg.data.train_data_path, cfg.data.valid_data_path = ["hf:mnist"], ["hf:mine"]
    saved = to_saved(cfg)["config"]
    assert {name: saved["logging"][name] for name in written} == {n: f"{tmp_path}/{p}" for n, p in written.items()}
    assert saved["images"]["picture_sheet"] == f"{tmp_path}/pictures.png"
    assert saved["data"]["train_data_path"] == ["hf:mnist"], "a name on the hub"
    assert saved["data"]["valid_data_path"] == [f"hf:{tmp_path}/mine"]


def test_derived_values_are_remembered() -> None:
    cfg = small(world_size=2)
    assert cfg.derived["global_batch_size"] == 4
    loaded = from_dict(json.loads(to_json(cfg)))
    assert loaded == cfg and loaded.derived == cfg.derived


def test_other_versions_of_the_package() -> None:
    document = to_dict(small())
    document["config"]["model"]["future_setting"] = 1
    document["config"]["future_part"] = {"x": 2}
    document["derived"].append("future_setting")
    del document["config"]["lsh"]
    del document["config"]["moe"]["num_experts"]
    cfg = from_dict(document)
    assert cfg.notices == ["ignored settings that this version does not have: model.future_setting, future_part.x"]
    assert cfg.lsh == Config().lsh and cfg.moe.num_experts is None and cfg.model.num_layers == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, r"version \(99\) must be at most 1: update megatron_lsh"),
        ({"version": "1"}, "must hold 'version' and 'config'"),
        ({"config": [1]}, "must hold 'version' and 'config'"),
        ({"config": {"model": 1}}, "must hold 'version' and 'config'"),
        ({"config": {"model": {"num_layers": "x"}}}, r"model.num_layers \(x\) must be an integer"),
    ],
)
def test_documents_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(to_dict(Config()) | change)


def test_json_is_plain() -> None:
    document = json.loads(to_json(small()))
    assert document["version"] == 1 and document["config"]["moe"]["num_experts"] == 8
    assert "ffn_hidden_size" in document["derived"]
    assert set(document) == {"version", "derived", "config"}


def test_start_up_shows_what_differs_or_everything() -> None:
    cfg = small()
    text = describe(cfg)
    lines = text.splitlines()
    assert any(line.split() == ["model.num_layers", "4"] for line in lines)
    assert any(line.split() == ["model.ffn_hidden_size", "256", "(derived)"] for line in lines)
    assert not any("lsh_num_hashes" in line for line in lines)
    assert lines[-1].strip().startswith(f"({len(SETTINGS) - len(lines) + 2} settings at their default")
    cfg.logging.print_full_config = True
    assert len(describe(cfg).splitlines()) == len(SETTINGS) + 1
    assert "lsh.lsh_num_hashes" in describe(cfg)
