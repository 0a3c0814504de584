"""Every Megatron-LM flag a MoE pretraining user may pass is ours, without effect, or rejected with advice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.config.compat import LIST, NO_EFFECT, REJECTED, SAME_AS_HERE, SWITCH, TAKEN_AS, VALUE
from megatron_lsh.config.settings import as_key, settings_of, spellings_of
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import SMALL
from tests.config.test_recipes import RECIPES

# name = default [kind], of Megatron-Core 0.12 to main of August 2026
LINES = (Path(__file__).parent / "megatron_flags.txt").read_text().splitlines()
MEGATRON = {
    match[1]: (match[2], match[3]) for line in LINES if (match := re.fullmatch(r"(--\S+) = (.*) \[(.*)\]", line))
}
OURS = spellings_of(settings_of(Config))

# Defaults that differ on purpose; each is explained by the flag's help.
OTHER_DEFAULT = {
    "--distributed-backend": "auto takes gloo where there is no GPU",
    "--moe-token-dispatcher-type": "alltoall sends less than allgather",
    "--moe-router-dtype": "routing is always at least fp32",
    "--recompute-modules": "Megatron fills in core_attn later",
    "--memory-snapshot-path": "given alone it turns --record-memory-history on",
    "--profile-ranks": "Megatron profiles rank 0 if the list is empty",
}


def test_the_list_is_complete() -> None:
    assert len(MEGATRON) == len([line for line in LINES if line.startswith("--")]) == 285


@pytest.mark.parametrize("flag", MEGATRON)
def test_every_flag_is_known_exactly_once(flag: str) -> None:
    implemented = as_key(flag) in OURS or flag in TAKEN_AS
    assert implemented + (flag in NO_EFFECT) + (flag in REJECTED) == 1


def test_the_tables_hold_megatrons_flags_and_say_why() -> None:
    assert set(SAME_AS_HERE) <= set(REJECTED)
    assert {no_effect.words for no_effect in NO_EFFECT.values()} == {SWITCH, VALUE, LIST}
    reasons = [no_effect.why for no_effect in NO_EFFECT.values()] + list(REJECTED.values())
    assert all(why and not why.endswith(".") and "\n" not in why for why in reasons)
    recipes = {word for args in RECIPES.values() for word in args if word.startswith("--")}
    neither = {*NO_EFFECT, *REJECTED, *TAKEN_AS} - set(MEGATRON) - recipes
    assert neither == {
        "--no-bias-dropout-fusion",
        "--eval-micro-batch-size",
    }  # Megatron's, used by neither


def test_other_names_set_what_they_stand_for() -> None:
    assert parse_args(["--use-rotary-position-embeddings"]).model.position_embedding_type == "rope"
    sharded = parse_args(["--use-torch-fsdp2", "--use-megatron-fsdp", "false"])
    assert sharded.parallel.use_distributed_optimizer
    assert sharded.notices == [f"--use-torch-fsdp2 is {TAKEN_AS['--use-torch-fsdp2'].why}"]


@pytest.mark.parametrize("flag", [flag for flag in MEGATRON if as_key(flag) in OURS])
def test_defaults_are_megatrons(flag: str) -> None:
    default, kind = MEGATRON[flag]
    setting = OURS[as_key(flag)].setting
    if flag in OTHER_DEFAULT:
        assert str(setting.default) != default
    elif kind.startswith("flag"):
        off = "turns off" in kind or default == "None"  # --no-save-optim and its kin are None in Megatron
        assert setting.default is off and (setting.off == flag) is off
    elif default == "None":
        assert setting.default is None
    else:
        assert setting.default == setting.convert(default)


@pytest.mark.parametrize("flag", NO_EFFECT)
def test_flags_without_effect_take_their_words_and_are_listed_once(flag: str) -> None:
    if flag in MEGATRON:
        kind = MEGATRON[flag][1]
        assert NO_EFFECT[flag].words == (SWITCH if kind.startswith("flag") else LIST if "list" in kind else VALUE)
    words = {SWITCH: [], VALUE: ["1"], LIST: ["p2p", "a2a"]}[NO_EFFECT[flag].words]
    cfg = parse_args([flag, *words, "--num-layers", "3", flag, *words])
    assert cfg.model.num_layers == 3
    assert cfg.notices == [f"no effect here: {flag}"]


def test_switches_without_effect_may_be_undone_and_take_no_other_word() -> None:
    assert parse_args(["--overlap-grad-reduce", "false", "--fp16", "false"]).notices == []
    with pytest.raises(ConfigError, match=r"--overlap-grad-reduce \(4\) must be true or false: drop 4"):
        parse_args(["--overlap-grad-reduce", "4"])


def test_flags_of_one_feature_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        parse_args(["--multi-latent-attention", "--bf16", "--q-lora-rank", "16", "--fp8-format", "hybrid"])
    mla, fp8 = str(error.value).splitlines()
    assert mla.startswith(
        "--multi-latent-attention --q-lora-rank are Megatron-LM's and not supported here: multi-latent"
    )
    assert fp8.startswith("--fp8-format is Megatron-LM's and not supported here: fp8 is not implemented")


@pytest.mark.parametrize("flag", REJECTED)
def test_rejected_flags_say_what_to_use_instead(flag: str) -> None:
    for words in ([], ["7"], ["a", "b"]):
        with pytest.raises(ConfigError) as error:
            parse_args([flag, *words, "--num-layers", "3"])
        assert str(error.value) == f"{flag} is Megatron-LM's and not supported here: {REJECTED[flag]}"


@pytest.mark.parametrize("flag", SAME_AS_HERE)
def test_asking_for_what_happens_anyway_is_accepted(flag: str) -> None:
    assert parse_args([flag, SAME_AS_HERE[flag]]).notices == [f"no effect here: {flag}"]


def test_advice_names_only_flags_that_exist() -> None:
    for advice in [*REJECTED.values(), *(no_effect.why for no_effect in NO_EFFECT.values())]:
        for flag in re.findall(r"--[\w-]+", advice):
            assert as_key(flag) in OURS or flag == "--config", f"{flag} in {advice!r}"


def test_a_parallel_size_that_is_not_implemented_parses_and_is_then_refused() -> None:
    flag = "--expert-tensor-parallel-size"
    cfg = parse_args([*SMALL, flag, "2"])
    with pytest.raises(ConfigError) as error:
        validate(cfg, 2)
    (line,) = str(error.value).splitlines()
    assert re.fullmatch(
        rf"parallel.{as_key(flag)} \(2\) must be 1, because .* is not implemented: set {flag} 1, and .*", line
    )
