"""The rivals of LSH: what they send, the plan of runs, and what is made of runs that were recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figures, ledger, rivals, subspace
from benchmarks.common import TrainingJob
from benchmarks.rivals import RIVALS, Job
from megatron_lsh.config import parse_args, validate
from tests.moe.test_dispatchers import HIDDEN, make_layer, run, single, tokens


def test_bytes_and_arithmetic_of_the_rivals() -> None:
    def of(name: str, sent: float = 1.0) -> tuple[float, float]:
        return RIVALS[name].bytes(sent), RIVALS[name].flops(sent)

    assert of("exact") == (1.0, 1.0)
    assert of("exact fp8") == (pytest.approx((128 + 4) / 256), 1.0)
    assert of("exact int4x32") == (pytest.approx((64 + 4 * 2) / 256), 1.0)
    assert of("exact mxfp4") == (pytest.approx((64 + 4 * 1) / 256), 1.0)
    assert of("top-1", 0.5) == (0.5, 0.5)
    assert of("LSH 20% int4x32", 0.2) == (pytest.approx(0.2 * 72 / 256), 0.2)
    assert of("experts of 128") == (1.0, 0.5)
    assert of("latent 32") == (0.25, 0.25) and of("latent 32, experts of 1024") == (0.25, 1.0)
    # 26 of 128 numbers, and four bases of 128 x 26 numbers every 20 steps beside 4 x 4,096 rows.
    assert of("subspace of 26")[0] == pytest.approx(26 / 128 * (1 + 4 * 128 / 20 / (4 * 4096)))
    assert rivals.deduplicated(2) == pytest.approx(0.5 * 1.5 * (1 + (16 + 8) / (4 * 256)))


def test_the_most_important_runs_come_first_and_their_flags_are_valid(tmp_path: Path) -> None:
    plan = rivals.plans()["rivals"]
    assert {job.variant for job in plan[:18]} == set(rivals.FIRST) and {job.iters for job in plan[:18]} == {250}
    assert {job.variant for job in plan} == set(RIVALS) and len(set(plan)) == len(plan)
    for job in [*plan[:36], *rivals.plans()["long"]]:
        words = [str(word) for word in rivals.training_job(job, tmp_path).flags]
        cfg = validate(parse_args(words), 1)
        assert (cfg.training.train_iters, cfg.training.seed) == (job.iters, job.seed)
        assert (cfg.checkpoint.save is None) == (job.iters <= 500)


def recorded_run(loss: float, sent: float | None) -> dict[str, Any]:
    return {"validation_loss": loss, "validation_loss_exact": loss, "rows_sent": sent, "seconds_per_step": 1.0}


def test_gaps_are_paired_by_seed_and_every_rival_is_a_series() -> None:
    found = {
        Job(name, seed, 250): recorded_run(5.0 + 0.1 * place + 0.01 * seed * place, 0.2 if "LSH" in name else None)
        for place, name in enumerate(("exact", "LSH 20%", "top-1"))
        for seed in (1, 2)
    }
    del found[Job("exact", 2, 250)]
    assert rivals.gaps(found, "LSH 20%", 250) == {1: pytest.approx(0.11)}
    assert "| LSH 20% | 2 | 20.0% | 20% | 5.115 ± 0.007 | +0.110 |" in rivals.report(found)
    figure = rivals.plot(rivals.entries(found, 250))
    assert figures.problems(figure) == []
    assert figure.axes[0].get_legend_handles_labels()[1] == ["exact, fewer bits", "top-1", "LSH"]


def test_runs_are_recorded_one_by_one_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_LSH_RESULTS", str(tmp_path))
    jobs = [TrainingJob(Job("exact", seed, 10), tmp_path / str(seed), []) for seed in (1, 2, 3)]
    started = []

    def ends(waiting: Any, parallel: int) -> Any:
        for job in waiting:
            started.append(job.key.seed)
            if job.key.seed == 3:
                raise SystemExit("stopped")
            yield job

    monkeypatch.setattr(ledger, "as_they_end", ends)

    def outcome(place: Path) -> dict[str, Any]:
        return recorded_run(float(place.name), None)

    for _ in range(2):
        with pytest.raises(SystemExit):
            ledger.train_recorded("kept", Job._fields, jobs, outcome, {"model": ["--flag"]})
    assert started == [1, 2, 3, 3]
    assert json.loads((tmp_path / "kept.json").read_text())["model"] == ["--flag"]
    kept = ledger.recorded("kept", Job._fields)
    assert {key[1]: run["validation_loss"] for key, run in kept.items()} == {1: 1.0, 2: 2.0}
    listed = ledger.list_of_runs([("exact", [1, 2, 3], 1200, 3.0)], len(kept))
    assert listed.endswith("3 runs, 3.0 hours of one core; 2 of them are recorded")


def test_two_commands_that_record_in_one_file_keep_each_others_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LSH_RESULTS", str(tmp_path))
    ours, theirs = (TrainingJob(Job("exact", seed, 10), tmp_path / str(seed), []) for seed in (1, 2))

    def record(job: TrainingJob) -> None:
        ledger.train_recorded("both", Job._fields, [job], lambda place: {"validation_loss": float(place.name)}, {})

    def ends(waiting: Any, parallel: int) -> Any:
        if waiting == [ours]:
            record(theirs)  # while ours runs
        yield from waiting

    monkeypatch.setattr(ledger, "as_they_end", ends)
    record(ours)
    assert {key[1] for key in ledger.recorded("both", Job._fields)} == {1, 2}


def test_rows_of_a_subspace_travel_and_what_is_not_in_it_is_lost() -> None:
    """With all directions it is exact; with few, outputs of every expert lie in as many, and gradients of rows too."""
    x = tokens(0)
    exact = run(make_layer(single(), "alltoall", moe_router_topk=1)[0], x)
    for dims in (HIDDEN, 4):
        layer, _ = make_layer(single(), f"benchmarks.subspace:dims_{dims}", moe_router_topk=1)
        layer.set_iteration(0, 100)
        whole = run(layer, x)  # nothing is known of the rows yet
        assert all(torch.allclose(whole[key], exact[key], atol=1e-6) for key in exact)
        layer.set_iteration(subspace.EVERY, 100)
        found = run(layer, x)
        rank = int(torch.linalg.matrix_rank(found["y"].flatten(0, 1), rtol=1e-4))
        same = all(torch.allclose(found[key], exact[key], atol=1e-4) for key in exact)
        assert (rank, same) == ((HIDDEN, True) if dims == HIDDEN else (4, False))
    layer.eval()
    before = layer(x)[0]
    layer.set_iteration(2 * subspace.EVERY, 100)
    assert torch.equal(layer(x)[0], before)  # an evaluation moves no basis
