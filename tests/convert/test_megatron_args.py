"""Megatron-LM's settings in its checkpoints: whole namespaces of seven versions, and one name at a time.

megatron_args.json was recorded by calling Megatron-LM's own ``parse_args`` and ``validate_args``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.config.compat import TAKEN_AS
from megatron_lsh.config.settings import as_key
from megatron_lsh.convert.megatron_args import args_of, config_of
from megatron_lsh.convert.megatron_settings import CUTS, READ, READ_TOO, REQUIRED, WITHOUT_EFFECT
from megatron_lsh.convert.torch_file import Inert
from megatron_lsh.errors import CheckpointError
from tests.config.test_recipes import RECIPES


def recorded() -> dict[str, dict[str, Any]]:
    versions: dict[str, dict[str, Any]] = {}
    args: dict[str, Any] = {}
    for version in json.loads((Path(__file__).parent / "megatron_args.json").read_text())["versions"]:
        args = {name: value for name, value in args.items() if name not in version["gone"]} | version["args"]
        versions[version["version"]] = args
    return versions


RECORDED = recorded()


@pytest.mark.parametrize("version", RECORDED)
def test_what_megatron_writes_is_read(version: str) -> None:
    cfg, notices = config_of(argparse.Namespace(**RECORDED[version]), "a file")
    model, moe = cfg.model, cfg.moe
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.kv_channels) == (2, 64, 96, 16)
    assert model.norm_epsilon == 1e-6, "norm_epsilon until core 0.15, layernorm_epsilon since"
    assert not model.add_bias_linear and model.swiglu and model.normalization == "RMSNorm"
    assert model.position_embedding_type == "rope" and model.untie_embeddings_and_output_weights
    assert (moe.num_experts, moe.moe_router_topk) == (4, 2) and moe.moe_ffn_hidden_size in (None, 32)
    assert not notices


def test_every_name_is_in_exactly_one_table() -> None:
    tables = [set(READ), set(READ_TOO), set(CUTS), set(REQUIRED), set(WITHOUT_EFFECT)]
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known)
    assert not {name for args in RECORDED.values() for name in args} - known
    arguments = {name for args in RECORDED.values() for name in args}
    flags = {as_key(word) for args in RECIPES.values() for word in args if word.startswith("--")}
    assert len(flags & arguments) > 150
    assert not {as_key(flag) for flag in TAKEN_AS} - known
    assert vars(args_of(config_of(small(), "a file")[0], 1, 1, 128, te=True)).keys() <= known


def small(**changes: Any) -> argparse.Namespace:
    args = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "num_experts": 4}
    return argparse.Namespace(**args | changes)


_BALANCING = "moe_router_load_balancing_type"
REFUSED = r"args in a file: %s \(.+\) must be .+ not supported here"
OTHER_VALUES = (True, 3, 0.5, "other", [1], {"a": 1}, Inert())


def test_a_setting_that_makes_another_model_is_refused_with_every_value_but_its_own() -> None:
    for name, allowed in REQUIRED.items():
        for value in (None, *allowed):
            config_of(small(**{name: value}), "a file")
        for value in OTHER_VALUES:
            if value not in allowed:
                with pytest.raises(CheckpointError, match=REFUSED % name):
                    config_of(small(**{name: value}), "a file")


def test_a_setting_that_nobody_knows_is_refused_unless_it_is_off() -> None:
    for value in (None, False, 0, 0.0, "", [], (), {}):
        config_of(small(new_kind=value), "a file")
    for value in OTHER_VALUES:
        with pytest.raises(CheckpointError, match=r"new_kind \(.+\) must be off, .+--ignore-settings new_kind"):
            config_of(small(new_kind=value), "a file")
        _, notices = config_of(small(new_kind=value), "a file", ["new_kind"])
        assert len(notices) == 1 and "new_kind" in notices[0] and "ignored, as you asked" in notices[0]
    with pytest.raises(CheckpointError, match="qk_l2_norm"):
        config_of(small(qk_l2_norm=True), "a file", ["qk_l2_norm"])


def test_what_does_not_touch_the_function_may_have_any_value() -> None:
    for value in OTHER_VALUES:
        config_of(small(**dict.fromkeys(WITHOUT_EFFECT, value)), "a file")


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"layernorm_epsilon": 1e-6}, "model.norm_epsilon", 1e-6),
        ({"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-5}, "model.norm_epsilon", 1e-6),
        ({"disable_bias_linear": True}, "model.add_bias_linear", False),
        ({"use_rotary_position_embeddings": True}, "model.position_embedding_type", "rope"),
        ({"encoder_num_layers": 2}, "model.num_layers", 2),
        ({_BALANCING: ["aux_loss", "global_aux_loss"]}, f"moe.{_BALANCING}", "aux_loss"),
        ({_BALANCING: "sinkhorn"}, f"moe.{_BALANCING}", "sinkhorn"),
        ({"moe_expert_capacity_factor": 1.5}, "moe.moe_expert_capacity_factor", 1.5),
    ],
)  # fmt: skip
def test_names_and_values_of_other_versions(given: dict[str, Any], name: str, value: Any) -> None:
    cfg, _ = config_of(small(**given), "a file")
    section, field = name.split(".")
    assert getattr(getattr(cfg, section), field) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_num_layers": 3}, r"encoder_num_layers \(3\) must be num_layers"),
        ({"normalization": Inert()}, r"normalization \(an object\) must be"),
        ({_BALANCING: "quantile_balancing"}, r"\(quantile_balancing\) must be one of"),
        ({"num_layers": [2]}, r"num_layers \(\[2\]\) must be an integer"),
        ({"moe_router_topk": 1}, r"cannot be trained here: moe.moe_router_topk \(1\)"),
        ({"tensor_model_parallel_size": "two"}, r"tensor_model_parallel_size \(two\) must be an integer"),
    ],
)
def test_settings_that_cannot_be_read(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"args in a file: .*{message}"):
        config_of(small(**given), "a file")
