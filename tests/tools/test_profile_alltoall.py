"""tools/profile_alltoall.py and megatron_lsh/training/alltoall_profile.py."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest

from megatron_lsh.commands import profile_alltoall
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.compressors.lsh import STAGES as LSH_STAGES
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.plan.cluster import read_cluster
from megatron_lsh.plan.cost_model import Steps, as_json, fit, measured_text, paper_ratio, predicted_text
from megatron_lsh.training.alltoall_profile import profiling_config
from tests.training.helpers import TINY, tiny_config


def steps(compute_ms: float, alltoall_ms: float, sent: float, lsh_ms: float = 0.0) -> Steps:
    total = compute_ms + alltoall_ms
    stages = dict.fromkeys(LSH_STAGES, lsh_ms / len(LSH_STAGES))
    return Steps(
        total, (total, total), alltoall_ms, 0.5 * compute_ms, lsh_ms, 0.0, 0.5 * compute_ms - lsh_ms, sent, stages
    )


def test_cost_model_repeats_the_measurement_and_scales_it() -> None:
    exact, lsh = steps(100.0, 80.0, 1e8), steps(120.0, 16.0, 2e7, lsh_ms=30.0)
    model = fit(exact, lsh, topk=2, hidden=1024, ranks=4)
    assert model.bandwidth == pytest.approx(1e8 / 0.080)
    assert model.ratio(model.bandwidth, 4) == pytest.approx(0.8)
    share, speedup = model.predict(model.bandwidth, 4)
    assert share == pytest.approx(exact.share) and speedup == pytest.approx(180.0 / 136.0)
    # Twice the network halves the ratio, twice the compute doubles it; of w ranks (w - 1) / w of the rows leave.
    assert model.ratio(2 * model.bandwidth, 4) == pytest.approx(0.4) and model.ratio(
        model.bandwidth, 4, 2.0
    ) == pytest.approx(1.6)
    assert model.ratio(model.bandwidth, 8) == pytest.approx(0.8 * (7 / 8) / (3 / 4))
    # LSH costs 20 ms and saves 80 MB: at 4 GB/s that is even.
    assert model.break_even == pytest.approx(8e7 / 0.020)
    assert model.predict(model.break_even, 4)[1] == pytest.approx(1.0)
    assert paper_ratio(6.0, 1.0, 1, 1, 2) == pytest.approx(1 / 3 / 2)
    assert model.predict(1e30, 4)[0] == pytest.approx(0.0) and model.predict(1e30, 4)[1] == pytest.approx(100 / 120)


def test_words() -> None:
    exact = steps(100.0, 80.0, 1e8)
    cheap = fit(exact, slower := steps(90.0, 70.0, 2e7), topk=2, hidden=64, ranks=2)
    assert math.isinf(cheap.break_even) and as_json(exact, slower, cheap)["cost_model"]["break_even"] is None
    text = measured_text(exact, slower, cheap)
    assert "break-even bandwidth: none" in text and "with 20% of the bytes the all-to-all took 88%" in text
    costly = fit(exact, steps(120.0, 16.0, 2e7), topk=2, hidden=64, ranks=2)
    assert "break-even bandwidth: 32 Gbit/s" in measured_text(exact, steps(120.0, 16.0, 2e7), costly)
    prediction = predicted_text(costly, [1, 100], ranks=8, speeds=[1, 10])
    assert (
        prediction.startswith("A MODEL, NOT A MEASUREMENT")
        and "100 Gbit/s" in prediction
        and "10x compute" in prediction
    )


def test_only_where_rows_travel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no all-to-all to profile; set --expert-model-parallel-size"):
        profiling_config(tiny_config())
    cfg = tiny_config(f"--expert-model-parallel-size 2 --save {tmp_path} --lsh-warmup-iters 5", world_size=2)
    profiled = profiling_config(cfg)
    assert profiled.moe.moe_token_dispatcher_type == "lsh" and profiled.lsh.lsh_warmup_iters == 0
    assert profiled.checkpoint.save is None and cfg.checkpoint.save == str(tmp_path)


@pytest.mark.parametrize("flag", ["--json", "--primitives-out"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = [*TINY.split(), "--train-iters", "2", flag, str(tmp_path / "file" / "figures.json")]
    assert profile_alltoall.main(words) == 1
    assert f"{flag} ({tmp_path}/file/figures.json) must be a file that can be written" in capsys.readouterr().err


def _profile(words: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert profile_alltoall.main(words) == 0
    return out.getvalue()


def test_measures_both_ways(tmp_path: Path) -> None:
    words = [
        *TINY.split(),
        "--train-iters",
        "2",
        "--expert-model-parallel-size",
        "2",
        "--steps",
        "2",
        "--predict-gbit",
        "5",
    ]
    rank0, rank1 = run_distributed_test(_profile, 2, [*words, "--json", str(tmp_path / "profile.json")])
    assert "measured, per step" in rank0 and "5 Gbit/s" in rank0 and "measured, per step" not in rank1
    figures = json.loads((tmp_path / "profile.json").read_text())
    assert 0.1 < figures["lsh"]["bytes"] / figures["exact"]["bytes"] < 0.4
    assert figures["lsh"]["lsh_ms"] > 0.0 == figures["exact"]["lsh_ms"]
    assert figures["exact"]["experts_ms"] > 0.0 and 0.0 < figures["exact"]["alltoall_ms"] < figures["exact"]["step_ms"]


@pytest.mark.slow
def test_primitives_are_what_a_cluster_file_includes(tmp_path: Path) -> None:
    """Two ranks as two nodes, so that rows cross; speeds are positive, and times grow with bytes."""
    words = [*TINY.split(), "--train-iters", "2", "--expert-model-parallel-size", "2", "--moe-node-size", "1"]
    rank0, _ = run_distributed_test(_profile, 2, [*words, "--steps", "1", "--primitives-out", str(tmp_path / "p.json")])
    assert "put `include: p.json` into a cluster file" in rank0
    (tmp_path / "c.yaml").write_text("include: p.json\nnodes: 2\nranks_per_node: 1\nmemory_gib: 1\n")
    cluster = read_cluster(tmp_path / "c.yaml")
    assert cluster.source == "measured" and cluster.slowdown >= 1.0 <= cluster.imbalance
    assert cluster.across.measured > 1e6 and cluster.across.bandwidth > 1e6 and cluster.parameters_per_second > 1e3
    assert all(0.01 <= cluster.across.speeds[kind] <= 10 for kind in ("reduction", "send"))
    assert 1e6 < cluster.coding < 1e13 and 1e6 < cluster.casting < 1e13 and cluster.step_seconds >= 0.0
    sizes = [size for size, _ in cluster.grouped.points]
    assert len(sizes) >= 3 and sizes == sorted(sizes) and all(rate > 0 for _, rate in cluster.grouped.points)
    assert all(rate > 0 for _, rate in cluster.dense.points) and cluster.lsh_row_seconds + 1 / cluster.lsh_flops > 0
