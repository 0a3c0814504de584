from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lsh.config import LoggingConfig
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.compressors.lsh import STAGES as LSH_STAGES
from megatron_lsh.moe.layer import GAUGES
from megatron_lsh.moe.telemetry import LayerReport
from megatron_lsh.observing.metrics import IntervalMetrics, duration
from megatron_lsh.observing.plot import plot_losses
from megatron_lsh.observing.restored_error import RestoredErrors
from megatron_lsh.observing.summary import Payload, byte_count, closing_lines
from megatron_lsh.observing.writers import JsonlFile, open_tensorboard, read_jsonl
from tests.training.helpers import tiny_config

REQUIRED = {
    "iteration", "consumed_samples", "lm_loss", "load_balancing_loss", "z_loss", "grad_norm", "learning_rate",
    "iteration_time_ms", "tokens_per_second", "alltoall_bytes", "alltoall_bytes_uncompressed", "alltoall_time_ms",
    "lsh_compression_rate", "lsh_residual_energy", "lsh_restored_error", "alltoall_share", "experts_time_ms", "wire_time_ms",
    "lsh_time_ms", "lsh_hash_time_ms", "lsh_cluster_time_ms", "lsh_refine_time_ms", "lsh_compress_time_ms",
    "lsh_restore_time_ms",
}  # fmt: skip


def layer(number: int, rate: float | None = 0.2, sent: float = 2e6) -> LayerReport:
    lsh = rate is not None
    figures = {gauge.name: None if gauge.optional else 0.0 for gauge in GAUGES} | {
        "load_balancing_loss": 1.0 + number,
        "z_loss": 2.0,
        "load_max_over_mean": 1.1,
        "load_p50": 10.0,
        "load_p95": 20.0,
        "alltoall_bytes": sent,
        "alltoall_bytes_uncompressed": 1e7 if sent else 0.0,
        "alltoall_time_ms": 3.0,
        "lsh_compression_rate": rate,
        "lsh_residual_energy": 0.3 if lsh else None,
        "experts_time_ms": 20.0,
        "lsh_time_ms": 0.5 * len(LSH_STAGES) if lsh else None,
        **{f"lsh_{stage}_time_ms": 0.5 if lsh else None for stage in LSH_STAGES},
        "lsh_restored_error": 0.1 * rate if lsh else None,
    }
    return LayerReport(number, {gauge.name: gauge for gauge in GAUGES}, figures)


def metrics(layers: list[LayerReport], **changes: object) -> IntervalMetrics:
    values: dict[str, object] = {
        "iteration": 20, "iterations": 10, "train_iters": 200, "consumed_samples": 160, "global_batch_size": 8,
        "lm_loss": 4.5, "grad_norm": 0.5, "learning_rate": 1e-3, "iteration_time_ms": 100.0, "tokens_per_second": 5000.0,
        "tflops": 0.01, "mfu": 0.25, "layers": layers,
    }  # fmt: skip
    return IntervalMetrics(**{**values, **changes})  # type: ignore[arg-type]


def payload_of(*intervals: IntervalMetrics) -> Payload:
    payload = Payload()
    for interval in intervals:
        payload.add(interval)
    return payload


def test_record_has_every_promised_key() -> None:
    record = metrics([layer(0), layer(2, rate=0.4)]).record(per_layer=False)
    assert set(record) >= REQUIRED
    assert record["load_balancing_loss"] == 2.0  # mean over layers
    assert record["alltoall_bytes"] == 4e6  # sum over layers
    assert record["lsh_compression_rate"] == pytest.approx(0.3)
    assert "lsh_compression_rate_per_layer" not in record
    per_layer = metrics([layer(0), layer(2, rate=0.4)]).record(per_layer=True)
    assert per_layer["moe_layers"] == [0, 2]
    assert per_layer["lsh_compression_rate_per_layer"] == [0.2, 0.4]
    assert per_layer["alltoall_time_ms_per_layer"] == [3.0, 3.0]


def test_times_add_up_over_layers() -> None:
    mixed = metrics([layer(0, rate=None), layer(1), layer(2)]).record(per_layer=True)
    assert (mixed["alltoall_time_ms"], mixed["experts_time_ms"], mixed["alltoall_share"]) == (9.0, 60.0, 0.09)
    assert (mixed["lsh_time_ms"], mixed["lsh_hash_time_ms"]) == (5.0, 1.0)  # two layers, five stages
    assert mixed["lsh_time_ms_per_layer"] == [None, 2.5, 2.5]
    assert mixed["lsh_refine_time_ms_per_layer"] == [None, 0.5, 0.5]
    assert mixed["lsh_restored_error"] == pytest.approx(0.02)
    exact = metrics([layer(0, rate=None)]).record(per_layer=True)
    assert exact["lsh_time_ms"] is exact["lsh_hash_time_ms"] is exact["lsh_restored_error"] is None


def test_record_is_json_whatever_happened() -> None:
    record = metrics([], lm_loss=None, grad_norm=float("nan"), mfu=None).record(per_layer=True)
    assert set(record) >= REQUIRED
    assert record["grad_norm"] is record["lm_loss"] is record["lsh_compression_rate"] is None
    assert record["alltoall_bytes"] == 0
    json.dumps(record, allow_nan=False)


def test_tensorboard_tags() -> None:
    scalars = metrics([layer(0), layer(2)], params_norm=7.0).scalars(per_layer=True)
    tags = {"iteration-time", "throughput", "params-norm", "load_balancing_loss", "z_loss", "moe/load_p95_layer_2"}
    tags |= {"moe/alltoall_share", "moe/lsh_restored_error", "moe/lsh_cluster_time_ms_layer_0", "moe/lsh_time_ms"}
    assert tags <= set(scalars)
    assert scalars["iteration-time"] == 0.1  # seconds, as in Megatron


def test_progress_line() -> None:
    line = metrics([layer(0)]).progress_line(3725.0)
    assert line == (
        "  10.0% | loss 4.5000 | 5,000 tokens/s | MFU 25.0% | LSH sends 20.0% of the rows, residual energy 0.300 | "
        "ETA 1:02:05"
    )
    pictures = metrics([], images_per_second=71.26).progress_line(1.0)
    assert "71.3 images/s" in pictures and "tokens" not in pictures
    assert duration(-1.0) == "0:00:00"


def test_mfu_is_that_of_the_arithmetic_that_was_done() -> None:
    """Half of the FLOPs are routed experts'; of two MoE layers one sends a fifth of its rows, the other all of them."""
    mixed = metrics([layer(0, None), layer(1, 0.2)], experts_share=0.5)
    assert mixed.mfu_done() == pytest.approx(0.25 * (1 - 0.5 * 0.4))
    assert "MFU 20.0% (an exact model at this speed: 25.0%)" in mixed.progress_line(0.0)
    assert mixed.record(per_layer=False)["mfu_done"] == mixed.mfu_done()
    exact = metrics([layer(0, None)], experts_share=0.5)
    assert exact.mfu_done() is None and "MFU 25.0% |" in exact.progress_line(0.0)


def test_jsonl_is_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    first = JsonlFile(path, 0)
    assert first.notice is None
    for iteration in (1, 2, 2, 3, 4):
        first.write({"iteration": iteration})
    first.close()
    with open(path, "a") as file:
        file.write('{"iteration": 5, "lm_lo')  # killed in the middle of a line
    resumed = JsonlFile(path, 2)
    assert resumed.notice is not None and "cut back to iteration 2" in resumed.notice
    resumed.write({"iteration": 3, "again": True})
    assert [record["iteration"] for record in read_jsonl(path)] == [1, 2, 2, 3]
    assert JsonlFile(path, 3).notice is None  # nothing to drop


def test_fresh_run_moves_an_older_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in ("old\n", "older\n"):
        path.write_text(text)
        fresh = JsonlFile(path, 0)
        assert fresh.notice is not None
    assert path.read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.jsonl.1", "metrics.jsonl.2"]


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--metrics-jsonl"):
        JsonlFile(tmp_path / "file" / "metrics.jsonl", 0)
    with pytest.raises(ConfigError, match="--tensorboard-dir"):
        open_tensorboard(LoggingConfig(tensorboard_dir=str(tmp_path / "file" / "tb")), 0)


def test_closing_lines() -> None:
    flags = "--moe-token-dispatcher-type lsh --expert-model-parallel-size 2 --lsh-clustering"
    lsh = tiny_config(f"{flags} bucket --lsh-num-hashes 2 --lsh-hash-width 8", world_size=2)
    payload, layers, advice = closing_lines(
        lsh, payload_of(metrics([layer(0), layer(1)]), metrics([layer(0), layer(1)]))
    )
    assert payload == ("all-to-all payload (lsh, 20 iterations): 80.00 MB sent, 400.00 MB uncompressed: 80.0% saved")
    assert "layer 0: 20.0%, 0.300; layer 1: 20.0%, 0.300" in layers
    across = dict(layer(0).figures) | {"alltoall_bytes_network": 5e5, "alltoall_bytes_network_uncompressed": 2e6}
    spread = LayerReport(0, layer(0).gauges, across)
    assert closing_lines(lsh, payload_of(metrics([spread])))[0] == (
        "all-to-all payload across the network (lsh, 10 iterations): 5.00 MB sent, 20.00 MB uncompressed: 75.0% saved; "
        "15.00 MB inside nodes"
    )
    assert "--lsh-num-hashes 3" in advice and "--lsh-hash-width 4" in advice and "alltoall" in advice
    budget = tiny_config(f"{flags} budget --lsh-target-rate 0.2 --lsh-refine-steps 1", world_size=2)
    assert "--lsh-target-rate 0.1 " in closing_lines(budget, payload_of(metrics([layer(0)])))[2]
    exact = closing_lines(tiny_config(), payload_of(metrics([layer(0, rate=None)])))
    assert "off" in exact[1] and "--moe-token-dispatcher-type lsh" in exact[2]
    alone = closing_lines(lsh, payload_of(metrics([layer(0, sent=0.0)])))
    assert "every rank holds all experts" in alone[0] and "--expert-model-parallel-size" in alone[2]
    assert closing_lines(lsh, payload_of(metrics([]))) == closing_lines(lsh, Payload()) == []
    assert [byte_count(n) for n in (12, 1.5e9, 2e16)] == ["12 B", "1.50 GB", "20000.00 TB"]


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlFile(path, 0)
    for iteration in range(1, 5):
        writer.write(metrics([layer(0)], iteration=iteration).record(per_layer=False))
    writer.write({"iteration": 4, "validation_loss": 4.0})
    png = plot_losses(path)
    assert png == tmp_path / "metrics.png"
    assert png.read_bytes()[:4] == b"\x89PNG" and png.stat().st_size > 5000
    path.write_text("")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_losses(path)


def test_a_layer_that_comes_above_the_probes_threshold_is_told_once() -> None:
    def errors(*of_layers: float | None) -> list[LayerReport]:
        reports = [layer(number) for number in range(len(of_layers))]
        return [
            LayerReport(report.layer, report.gauges, {**report.figures, "lsh_restored_error": error})
            for report, error in zip(reports, of_layers, strict=True)
        ]

    cfg = LSHConfig(lsh_probe_interval=10, lsh_probe_warn=0.05, lsh_target_rate="[0.2,0.7]", lsh_residual="none")
    watch = RestoredErrors(cfg)
    assert watch.look(errors(0.05, 0.01)) is None
    line = watch.look(errors(0.0512, 0.01)) or ""
    assert "--lsh-probe-warn 0.05 (error over energy of the exact outputs; layer 0: 0.051)" in line
    assert "--lsh-target-rate [0.4,1.0] sends twice the rows; --lsh-residual interpolate restores closer" in line
    assert watch.look(errors(0.3, 0.01)) is None and watch.above == {0}
    assert watch.look(errors(None, None)) is None and watch.above == {0}  # no probe in this interval
    assert "layer 0: 0.300, layer 1: 0.060" in (watch.look(errors(0.3, 0.06)) or "")
    assert watch.look(errors(0.04, 0.06)) is None and watch.above == {1}
    assert "layer 0: nan" in (watch.look(errors(float("nan"), None)) or "") and watch.above == {0, 1}
    for other, fix in (
        (LSHConfig(lsh_probe_interval=1, lsh_target_energy=0.2), "--lsh-target-energy 0.1 sends more rows"),
        (LSHConfig(lsh_probe_interval=1, lsh_clustering="bucket"), "--lsh-clustering budget sends"),
    ):
        assert fix in (RestoredErrors(other).look(errors(0.9)) or "")
    assert RestoredErrors(LSHConfig()).look(errors(0.9)) is None
    assert RestoredErrors(LSHConfig(lsh_probe_interval=1, lsh_probe_warn=0)).look(errors(0.9)) is None
