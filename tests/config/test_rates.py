"""--lsh-target-rate: one number, one per layer or stack, and changing along a run."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.rates import Rates
from megatron_lsh.config.serialize import from_dict, to_dict
from megatron_lsh.config.t5 import T5Config
from megatron_lsh.errors import ConfigError
from tests.moe.test_dispatchers import make_layer, run, single, tokens
from tests.training.helpers import tiny_config

RATE = st.floats(1e-6, 1.0, exclude_min=True)
PHASE = RATE.map(lambda rate: (rate,)) | st.lists(RATE, min_size=4, max_size=4).map(tuple)
PHASES = st.lists(PHASE, min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(PHASES, st.integers(0, 3), st.integers(0, 60))
def test_what_is_written_is_what_was_read(rates: list[tuple[float, ...]], layer: int, iteration: int) -> None:
    phases = Rates(tuple((20 * n, of_phase) for n, of_phase in enumerate(rates)))
    again = Rates.of(str(phases))
    assert again == phases and str(again) == str(phases)
    wanted = rates[min(iteration // 20, len(rates) - 1)]  # by arithmetic, where the object searches
    assert again.at(layer, iteration) == wanted[layer % len(wanted)]
    assert again.span() == (min(map(min, rates)), max(map(max, rates)))


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("0.2", "0.2"),
        (0.2, "0.2"),
        ("1", "1.0"),
        ("[0.1]*2 + [0.2]*2", "[0.1]*2+[0.2]*2"),
        ("(2*[0.1]+[0.2,0.3])", "[0.1]*2+[0.2]+[0.3]"),
        ("[0.1,0.2], 0.3@10, [0.5,1]@200", "[0.1,0.2],0.3@10,[0.5,1.0]@200"),
        ([0.1, 0.2], "[0.1,0.2]"),
    ],
)
def test_ways_to_write_them(text: object, spelling: str) -> None:
    assert str(Rates.of(text)) == spelling


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0", "must be above 0 and at most 1"),
        ("1.01", "must be above 0 and at most 1"),
        ("nan", "must be above 0 and at most 1"),
        ("[0.1,2]", "must be above 0 and at most 1, which 2 is not"),
        ("few", "must be a number, a list"),
        ("", "must be a number, a list"),
        ("[]", "must be a number, a list"),
        ("[0.1]*0", "must be a number, a list"),
        ("[[0.1]]", "must be a number, a list"),
        (True, "must be a number, a list"),
        ("[0.1]*1000000000", "must have at most 10,000 entries"),
        ("0.1,0.2", "must say from which iteration on"),
        ("0.1,0.2@x", "must name an iteration"),
        ("0.1@5", "must begin at iteration 0"),
        ("0.1,0.2@50,0.3@50", "at a later iteration"),
        ([], "between 1 and 10,000 entries"),
    ],
)
def test_what_is_no_rate(text: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Rates.of(text)


def test_a_list_fits_the_layers_or_the_stacks_of_the_model() -> None:
    assert tiny_config("--lsh-target-rate [0.1,0.2]").lsh.lsh_target_rate == "[0.1,0.2]"
    assert tiny_config("--lsh-target-rate [0.1]").lsh.lsh_target_rate == "0.1"
    with pytest.raises(ConfigError, match=r"lsh_target_rate \(\[0.1\]\*3\) has a list of 3 and must have 2, one per layer "
                                          r"of the model: change --lsh-target-rate"):  # fmt: skip
        tiny_config("--lsh-target-rate [0.1]*3")
    t5 = ["--encoder-num-layers", "3", "--decoder-num-layers", "2", "--hidden-size", "8", "--num-attention-heads", "2",
          "--seq-length", "8", "--micro-batch-size", "1", "--train-iters", "1", "--mock-data", "--vocab-size", "30",
          "--num-experts", "2", "--lr", "1e-3"]  # fmt: skip
    of_stacks = validate(parse_args([*t5, "--lsh-target-rate", "0.5,[0.1,0.2]@9"], T5Config), 1)
    assert of_stacks.lsh.lsh_target_rate == "0.5,[0.1]*3+[0.2]*2@9"
    assert validate(of_stacks, 1).lsh.rates().of_layer(3) == (0.5, 0.2)
    with pytest.raises(
        ConfigError, match="has a list of 4 and must have 5, one per layer of the model or 2, one per stack"
    ):
        validate(parse_args([*t5, "--lsh-target-rate", "[0.1]*4"], T5Config), 1)


def test_a_saved_configuration_repeats_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    cfg = tiny_config("--lsh-target-rate 0.1,[0.2,0.3]@7")
    document = json.loads(json.dumps(to_dict(cfg)))
    assert from_dict(document).lsh == cfg.lsh
    document["config"]["lsh"]["lsh_target_rate"] = 0.25  # as earlier versions saved it
    assert from_dict(document, Config).lsh.rates() == Rates.of("0.25")
    for written, read in (("[0.2, 0.3]", "[0.2,0.3]"), ("0.1,[0.2,0.3]@7", "0.1,[0.2,0.3]@7"), ("0.4", "0.4")):
        (tmp_path / "a.yaml").write_text(f"lsh:\n  lsh_target_rate: {written}\n")
        assert str(parse_args(["--config", str(tmp_path / "a.yaml")]).lsh.rates()) == read


def test_a_layer_sends_what_its_rate_says_now() -> None:
    """Layer 3; from iteration 5 on it sends every row, and is exact."""
    x = tokens(0)
    layer, telemetry = make_layer(single(), "lsh", LSHConfig(lsh_target_rate="0.5,[0.1,0.1,0.1,0.25]@2,1@5"))
    seen = {}
    for iteration in (0, 1, 2, 4, 5, 9):
        layer.set_iteration(iteration)
        last = run(layer, x)
        (report,) = telemetry.collect(single(), iterations=1)
        seen[iteration] = report["lsh_compression_rate"]
    assert seen[0] == seen[1] == pytest.approx(0.5, abs=0.1) and seen[2] == seen[4] == pytest.approx(0.25, abs=0.1)
    assert seen[5] == seen[9] == 1.0
    exact = run(make_layer(single())[0], x)
    assert all(torch.equal(last[name], value) for name, value in exact.items())


def test_a_rate_follows_the_energy_within_its_bounds() -> None:
    """Of a layer whose energy falls with its rate as 0.21 exp(-4.8 rate), from above and from below."""
    for start, energy in ((0.9, 0.1), (0.1, 0.04), (0.3, 0.001), (0.3, 0.5)):
        rates = Rates.of("0.1,0.6@100,0.5@200").following(energy, 0.05)
        rate, seen = start, []
        for iteration in range(101, 200):
            rate = rates.followed(2, iteration, rate, 0.21 * math.exp(-4.8 * rate))
            seen.append(rate)
        wanted = min(max(math.log(0.21 / energy) / 4.8, 0.05), 0.6)
        assert rate == pytest.approx(wanted, rel=0.01)
        steps = [abs(math.log(b / a)) for a, b in itertools.pairwise(seen)]
        assert max(steps) <= 0.1001
        assert rates.followed(2, 200, 0.6, energy) == 0.5  # the next bound holds at once
    assert rates.followed(2, 101, 0.3, None) == 0.3
    assert rates.followed(2, 101, 0.3, 0.0) == pytest.approx(0.3 * math.exp(-0.1))
    assert (rates.span(), rates.of_layer(0)) == ((0.05, 0.6), (0.1, 0.6, 0.5, 0.05))
    assert Rates.of("0.2").following(None, 0.05) == Rates.of("0.2")


def test_what_cannot_follow_an_energy_is_refused() -> None:
    lsh = "--moe-token-dispatcher-type lsh --lsh-target-energy"
    rates = tiny_config(f"{lsh} 0.1 --lsh-target-rate [0.2,0.4] --lsh-least-rate 0.2").lsh.rates()
    assert (rates.energy, rates.least, rates.at(1, 0)) == (0.1, 0.2, 0.4)
    for flags, rule in (
        (
            "0.1 --lsh-clustering bucket",
            r"lsh_target_energy \(0.1\) must not be given with lsh.lsh_clustering \(bucket\)",
        ),
        (
            "0.1 --lsh-target-rate [0.3,0.1] --lsh-least-rate 0.2",
            r"lsh_least_rate \(0.2\) must be at most lsh.lsh_target",
        ),
        ("1", r"lsh_target_energy \(1.0\) must be above 0 and below 1: change --lsh-target-energy"),
        ("0.1 --lsh-least-rate 0", r"lsh_least_rate \(0.0\) must be above 0 and at most 1: change --lsh-least-rate"),
    ):
        with pytest.raises(ConfigError, match=rule):
            tiny_config(f"{lsh} {flags}")
    with pytest.raises(
        ConfigError, match=r"lsh_probe_interval \(5\) must not be given with moe.moe_expert_dropout \(0.1\)"
    ):
        tiny_config("--lsh-probe-interval 5 --moe-expert-dropout 0.1")
    for flags, notice in (
        ("--lsh-target-energy 0.1", "no effect without --num-experts and --moe-token-dispatcher-type lsh"),
        ("--lsh-least-rate 0.1", "no effect without --lsh-target-energy"),
        ("--lsh-probe-warn 0.1", "no effect without --lsh-probe-interval"),
    ):
        assert any(line.startswith(notice) for line in tiny_config(flags).notices)
