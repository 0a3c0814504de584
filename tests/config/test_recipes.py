"""Megatron-LM's own command lines: 250 functional-test recipes, as they stand and with one pipeline stage."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_lsh.config import BertConfig, Config, T5Config, parse_args, validate
from megatron_lsh.config.compat import NO_EFFECT, REJECTED, TAKEN_AS
from megatron_lsh.config.settings import as_key, settings_of, spellings_of
from megatron_lsh.errors import ConfigError

ACCEPTED, AS_THEY_STAND = 201, 196  # of 250, with one pipeline stage and with their own; may only rise
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
    """The recipe with --pipeline-model-parallel-size 1."""
    return ["1" if before == "--pipeline-model-parallel-size" else word for before, word in pairwise(["", *args])]


def accepted(name: str, args: list[str]) -> Config:
    """On as few ranks as the recipe can have."""
    lists = [word.strip("[]") if before == "--recompute-modules" else word for before, word in pairwise(["", *args])]
    cfg = parse_args(lists, family(name))
    parallel = cfg.parallel
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return validate(cfg, parallel.pipeline_model_parallel_size * math.lcm(dense, parallel.expert_model_parallel_size))


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
    for name, args in RECIPES.items():
        try:
            cfg = accepted(name, on_one_stage(args))
        except ConfigError as error:
            refused[name] = str(error)
        else:
            assert sum(notice.startswith("no effect here: ") for notice in cfg.notices) == 1
    for name, message in refused.items():
        for line in message.splitlines():
            assert "not implemented" in line or (name == FRAGMENT and "must be given" in line), f"{name}: {line}"
    assert len(RECIPES) - len(refused) == ACCEPTED, "may only rise; then raise the number here"


@pytest.mark.slow
def test_recipes_are_accepted_with_their_own_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those whose number of micro-batches does not fit the fewest ranks, or whose stages have no layer."""
    monkeypatch.chdir(tmp_path)
    count = 0
    for name, args in RECIPES.items():
        with contextlib.suppress(ConfigError):
            accepted(name, args)
            count += 1
    assert count == AS_THEY_STAND, "may only rise; then raise the number here"
