"""Megatron-LM's own command lines: 250 functional-test recipes, with one pipeline stage and one context-parallel rank."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_lsh.config import BertConfig, Config, T5Config, parse_args, validate
from megatron_lsh.config.compat import NO_EFFECT, REJECTED, TAKEN_AS
from megatron_lsh.config.settings import as_key, settings_of, spellings_of
from megatron_lsh.errors import ConfigError

ACCEPTED = 201  # of 250; may only rise
FRAGMENT = "gpt/gpt3_mcore_reruns_resume_check_grads"  # a second run's few flags, without a model


def read_recipes() -> dict[str, list[str]]:
    file = json.loads((Path(__file__).parent / "megatron_recipes.json").read_text())
    options = [shlex.split(option) for option in file["options"]]
    return {
        name: [word for number in numbers.split() for word in options[int(number)]]
        for name, numbers in file["recipes"].items()
    }


RECIPES = read_recipes()
FAMILIES: Mapping[str, type[Config]] = {"bert": BertConfig, "t5": T5Config}


def family(name: str) -> type[Config]:
    return FAMILIES.get(name.split("/")[0], Config)


def on_one_stage(args: list[str]) -> list[str]:
    """The recipe with --pipeline-model-parallel-size 1 and --context-parallel-size 1."""
    one = {"--pipeline-model-parallel-size", "--context-parallel-size"}
    return [
        "1" if before in one else word.strip("[]") if before == "--recompute-modules" else word
        for before, word in zip(["", *args], args, strict=False)
    ]


def accepted(name: str) -> Config:
    cfg = parse_args(on_one_stage(RECIPES[name]), family(name))
    parallel = cfg.parallel
    return validate(cfg, math.lcm(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size))


def test_every_flag_of_the_recipes_is_in_exactly_one_table() -> None:
    for name, args in RECIPES.items():
        ours = spellings_of(settings_of(family(name)))
        for flag in {word for word in args if word.startswith("--")}:
            implemented = as_key(flag) in ours or flag in TAKEN_AS
            # A flag that another family's script has is refused by the name of that script.
            assert implemented or (flag in NO_EFFECT) != (flag in REJECTED), flag
            assert not (implemented and flag in NO_EFFECT), flag


def test_recipes_are_accepted_or_refused_by_the_name_of_a_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # validate() tries to write in the folders of the recipes
    refused: dict[str, str] = {}
    for name in RECIPES:
        try:
            cfg = accepted(name)
        except ConfigError as error:
            refused[name] = str(error)
        else:
            assert sum(notice.startswith("no effect here: ") for notice in cfg.notices) == 1
    for name, message in refused.items():
        for line in message.splitlines():
            assert "not implemented" in line or (name == FRAGMENT and "must be given" in line), f"{name}: {line}"
    assert len(RECIPES) - len(refused) == ACCEPTED, "may only rise; then raise the number here"
