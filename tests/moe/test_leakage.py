"""Does training with LSH find a way to the future? With controls that do find it, or else the answer means nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.leakage import (
    CONTROLS,
    MARGIN,
    RESTORATIONS,
    SCOPES,
    SIZES,
    Size,
    below,
    build,
    channel,
    losses,
    merged,
    once,
    run,
)
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import local
from megatron_lsh.parallel.testing import run_distributed_test

SMALL = Size(length=16, batch=16, hidden=32, steps=32, lr=1e-2)
CHOICE = replace(SMALL, batch=64, steps=48, lr=5e-3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def best(variant: str, size: Size) -> float:
    """Nats below the entropy of the text, in the best eighth of a run."""
    return below(list(losses(build(variant, size, 1), once, size, seed=1)), size.vocab)


@pytest.mark.parametrize(
    ("control", "size"), [("planted", SMALL), pytest.param("expert choice", CHOICE, marks=pytest.mark.slow)]
)
def test_what_shows_the_future_is_found_out(control: str, size: Size) -> None:
    assert control in CONTROLS
    assert best(control, size) > 2 * MARGIN


@pytest.mark.parametrize("variant", ["interpolate 20%", pytest.param("none 50%", marks=pytest.mark.slow)])
def test_training_with_lsh_stays_at_the_entropy_of_the_text(variant: str) -> None:
    assert best(variant, SMALL) < MARGIN


def test_the_channel_is_there_and_closes_when_every_row_is_sent() -> None:
    """Early logits do depend on later tokens, through shared clusters; docs/lsh.md says so."""
    for variant in ("interpolate 20%", "none 50%", "paper"):
        assert 1e-4 < channel(build(variant, SMALL, 1), SMALL, 1) < 1.0
    assert channel(build("exact", SMALL, 1), SMALL, 1) < 1e-6


@pytest.mark.parametrize(
    "variant", ["past 20%", *(pytest.param(f"past {rate}%", marks=pytest.mark.slow) for rate in (5, 50))]
)
def test_with_rows_of_the_micro_batch_before_no_token_sees_a_later_one(variant: str) -> None:
    """The remedy. Changed are all later tokens, and looked at all logits before; nothing of a trained model moves."""
    size = replace(SMALL, steps=3)
    model = build(variant, size, 1)
    list(losses(model, once, size, seed=1))
    assert channel(model, size, 1) < 1e-6
    tokens_BS, labels_BS, _ = once(size, torch.Generator().manual_seed(5))
    for cut in (1, 7, size.length - 1):
        changed_BS = tokens_BS.clone()
        changed_BS[:, cut:] = changed_BS[:, cut:].flip(0)
        with torch.no_grad():
            before, after = (model(batch, labels_BS)[0][:, :cut] for batch in (tokens_BS, changed_BS))
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # and no sequence another
        alone = model(torch.cat([tokens_BS[:1], tokens_BS.flip(0)[1:]]), labels_BS)[0][0]
        torch.testing.assert_close(alone, model(tokens_BS, labels_BS)[0][0], rtol=1e-5, atol=1e-6)


def test_results_of_other_runs_stay_in_the_file(tmp_path: Path) -> None:
    def found(variant: str, seed: int, value: float) -> dict[str, Any]:
        return {"variant": variant, "task": "once", "seed": seed, "size": {"steps": 4}, "below_log_v": value}

    path = tmp_path / "leakage.json"
    first = merged(path, [found("exact", 1, 0.1), found("paper", 1, 0.2)])
    path.write_text(json.dumps({"runs": first}))
    again = merged(path, [found("paper", 1, 0.3), found("paper", 2, 0.4)])
    assert again == [found("exact", 1, 0.1), found("paper", 1, 0.3), found("paper", 2, 0.4)]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["once", "twins"])
@pytest.mark.parametrize("variant", [f"{name} 50%" for name in RESTORATIONS if name != "paper"] + ["paper"])
def test_no_restoration_lets_training_see_the_future(variant: str, task: str) -> None:
    size = SMALL if task == "once" else replace(SIZES["twins"], hidden=32, length=128, steps=100, lr=5e-3)
    assert run(variant, task, size, seed=1)["below_log_v"] < MARGIN


@pytest.mark.slow
@pytest.mark.parametrize("variant", SCOPES)
def test_no_scope_lets_training_see_the_future(variant: str) -> None:
    """Rows of a rank or of a node; each on its own has the channel, and training finds no use for it."""
    assert channel(build(variant, SMALL, 1), SMALL, 1) > 1e-5
    assert best(variant, SMALL) < MARGIN


@pytest.mark.slow
def test_the_control_of_the_twins_is_found_out() -> None:
    size = replace(SIZES["twins"], hidden=32, length=128, steps=100, lr=5e-3)
    assert run("planted", "twins", size, seed=1)["below_log_v"] > 2 * MARGIN


def on_a_rank(variant: str) -> float:
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4, moe_node_size=2))
    model = build(variant, SMALL, 1, ctx)

    def average(model: GPTModel) -> None:
        for name, parameter in model.named_parameters():
            gradient = local(parameter.grad)
            if ".experts." not in name:
                dist.all_reduce(gradient)
            gradient.div_(ctx.world.size)

    return below(list(losses(model, once, SMALL, seed=ctx.rank, settle=average)), SMALL.vocab)


@pytest.mark.slow
def test_node_scope_does_not_let_training_see_the_future() -> None:
    """On 2 nodes of 2 ranks, clusters join rows of two ranks."""
    for variant in ("none 50%", "interpolate 20%"):
        assert max(run_distributed_test(on_a_rank, 4, variant, timeout_s=300.0)) < MARGIN
    assert min(run_distributed_test(on_a_rank, 4, "planted", timeout_s=300.0)) > 2 * MARGIN
