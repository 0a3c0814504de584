"""The benchmarks run and say what they should; their figures are not for here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    against,
    families,
    figures,
    gradient_error,
    layouts,
    overhead,
    peers,
    quality,
    slow_network,
    time_to_loss,
    vision,
)
from benchmarks.common import TrainingJob, finished, read_metrics, train_all
from benchmarks.slow_link import SlowLinks, why_not
from benchmarks.variants import Variant
from megatron_lsh.config import BertConfig, Config, T5Config, parse_args, validate
from megatron_lsh.config.swin import SwinConfig
from tests.training.helpers import TINY


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are written instead of benchmarks/results/."""

    def write(name: str, result: dict) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result, default=str))
        return path

    for module in (against, overhead, peers, slow_network):
        monkeypatch.setattr(module, "write_result", write)
        monkeypatch.setattr(module, "ROOT", tmp_path, raising=False)  # not all of them write figures
    return tmp_path


def test_overhead(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--tokens", "64", "--hidden", "32", "--experts", "4", "--repeats", "2"])
    sizes = json.loads((results / "overhead.json").read_text())["sizes"]
    assert [(s["tokens"], s["hidden"], s["experts"]) for s in sizes] == [(64, 256, 8), (2048, 32, 8), (2048, 256, 4)]
    for size in sizes:
        assert all(ms > 0 for ms in size["ms"].values()) and size["share_of_layer"] > 0
        assert size["lsh_ms"] == pytest.approx(
            sum(size["ms"][s] for s in ("hash", "cluster", "refine", "compress", "restore"))
        )
    assert "| 64 | 256 | 8 | 16 |" in capsys.readouterr().out


@pytest.mark.slow  # two interpreters that import torch
def test_against_itself(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against.main([str(Path(__file__).parents[2]), "--tokens", "64", "--hidden", "32", "--repeats", "2"])
    (size,) = json.loads((results / "against.json").read_text())["sizes"]
    assert size["ratio"] > 0 and min(size["ms"].values()) > 0 and set(size["ms"]) == set(size["before_ms"])
    assert "wrote" in capsys.readouterr().out


def test_names_of_variants() -> None:
    names = [Variant().name, Variant(wire="fp8").name, Variant(0.2).name, Variant(0.35, "int4").name]
    assert names == ["exact", "exact, fp8", "LSH 20%", "LSH 35%, int4"]


def test_a_layout_wins_where_no_quartile_of_another_meets_its_own(tmp_path: Path) -> None:
    def link(hidden: int, mbit: float, exact: list[float], pipeline: list[float]) -> dict:
        return {"hidden": hidden, "mbit_per_node": mbit, "steps_ms": {"exact": exact, "pipeline": pipeline}}

    measured = [
        link(128, 800, [10.0, 11.0, 12.0], [10.5, 11.5, 12.5]),
        link(128, 50, [40.0, 42.0, 44.0], [20.0, 21.0, 22.0]),
        link(64, 50, [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]),
    ]
    assert layouts.report(measured).splitlines() == [
        "| hidden size | Mbit/s per node | times | exact, ms | pipeline, ms |",
        "|---|---|---|---|---|",
        "| 64 | 50 | 3 | **5** (4-6) | 8 (8-8) |",
        "| 128 | 50 | 3 | 42 (41-43) | **21** (20-22) |",
        "| 128 | 800 | 3 | **11** (10-12) | 12 (11-12) |",
        "",
        "Fastest at (hidden size at Mbit/s per node)",
        "exact: 64 at 50",
        "pipeline: 128 at 50",
        "nobody, by the quartiles: 128 at 800",
    ]
    kept = tmp_path / "kept.json"
    assert layouts.read_kept(kept) == []
    kept.write_text(json.dumps(measured))
    wanted = argparse.Namespace(hidden=[64, 128], mbit=[50.0, 800.0])
    assert layouts.left_to_measure(wanted, layouts.read_kept(kept)) == {64: [800.0]}


def test_steps_needed_lie_between_two_lengths() -> None:
    losses = {100: 5.0, 400: 4.0}
    assert time_to_loss.steps_needed(losses, 4.5) == pytest.approx(200)
    assert time_to_loss.steps_needed(losses, 4.0) == pytest.approx(400)
    assert time_to_loss.steps_needed(losses, 3.9) is None and time_to_loss.steps_needed(losses, 5.1) is None


def test_bytes_of_a_variant() -> None:
    assert quality.relative_bytes("exact", 1.0) == 1.0
    assert quality.relative_bytes("interpolate", 0.2) == pytest.approx(0.2)
    assert quality.relative_bytes("budget int4", 0.2) == pytest.approx(0.2 * (64 + 4) / 256)


def test_families_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From finished runs: gaps are paired by seed, the unfinished is left to `train_all`, curves are drawn."""
    monkeypatch.setattr(families, "prepare", lambda names: None)
    monkeypatch.setattr(families, "write_result", lambda name, result: tmp_path / name)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    wanted = []
    monkeypatch.setattr(families, "train_all", lambda jobs, outcome: wanted.extend(jobs))
    found = {("exact", 1): 4.0, ("exact", 2): 4.5, ("LSH 20%", 1): 4.1, ("LSH 20%", 2): 4.8}
    for (dispatcher, seed), loss in found.items():
        job = families.job_for(("t5", dispatcher, seed, 20), tmp_path / "runs")
        job.place.mkdir(parents=True)
        lsh = dispatcher != "exact"
        common = {"alltoall_bytes_uncompressed": 5e6, "iteration_time_ms": 7.0}
        common |= {"alltoall_bytes": 1e6 if lsh else 5e6, "lsh_compression_rate": 0.2 if lsh else None}
        common |= {"lsh_residual_energy": 0.1 if lsh else None}
        records = [{"iteration": i, "lm_loss": loss + 1 / i} | common for i in (10, 20)]
        lines = [*records, {"iteration": 20, "validation_loss": loss, "validation_loss_exact": loss - 0.1}]
        (job.place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (job.place / "done.json").write_text(json.dumps({"job": job.key} | families.outcome(job.place)))
    families.main(["--families", "t5", "--seeds", "1", "2", "--iters", "20", "--folder", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert "| t5 | exact | 20 | 2 | 4.250 ± 0.354 |  |  | 100.0% | 5.00 | 5.00 |  | 7 |" in out
    assert "| t5 | LSH 20% | 20 | 2 | 4.450 ± 0.495 | 0.200 ± 0.141 | 4.350 ± 0.495 | 20.0% | 1.00 | 5.00 |" in out
    assert (tmp_path / "docs" / "figures" / "families.png").exists()
    assert {job.place.name for job in wanted} == {path.name for path in (tmp_path / "runs").iterdir()}
    assert wanted[0].script == "pretrain_t5_moe.py" and wanted[0].ranks == 2


def test_flags_of_the_families_are_valid() -> None:
    for name, config_class in (("gpt", Config), ("bert", BertConfig), ("t5", T5Config)):
        for dispatcher in families.DISPATCHERS:
            job = families.job_for((name, dispatcher, 1, 30), Path("runs"))
            validate(parse_args([*map(str, job.flags), "--metrics-jsonl", os.devnull], config_class), job.ranks)


@pytest.mark.slow
def test_training_jobs_are_done_once(tmp_path: Path) -> None:
    flags = [*TINY.split(), "--train-iters", "2", "--eval-interval", "2", "--metrics-jsonl"]
    jobs = [TrainingJob(("tiny", n), tmp_path / str(n), [*flags, tmp_path / str(n) / "metrics.jsonl"]) for n in (1, 2)]
    (jobs[1].place).mkdir()
    (jobs[1].place / "done.json").write_text('{"job": ["tiny", 2], "loss": 1.0}')
    train_all(jobs, lambda place: {"loss": read_metrics(place / "metrics.jsonl")[1][-1]["validation_loss"]})
    results = finished(tmp_path)
    assert set(results) == {("tiny", 1), ("tiny", 2)}
    assert results["tiny", 2] == {"loss": 1.0} and 3.0 < results["tiny", 1]["loss"] < 5.0
    assert not (jobs[1].place / "log.txt").exists()


needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@pytest.mark.network
@needs_namespaces
def test_slow_links_are_slow_and_leave_nothing(tmp_path: Path) -> None:
    before = namespaces()
    try:
        links = SlowLinks(2).__enter__()
    except SystemExit as error:  # root, but not of this machine's network
        pytest.skip(str(error))
    try:
        port = 29650
        listen = f"import socket; s = socket.create_server(('', {port})); print(s.accept()[0].recv(9).decode())"
        listener = links.start(0, [sys.executable, "-c", listen], port, tmp_path / "log")
        send = f"""
import os, socket, time
from benchmarks.common import TrainingJob, finished, read_metrics, train_all
from benchmarks.slow_link import sent_bytes, set_rate
set_rate(5); set_rate(7)
os.system("tc qdisc")
for _ in range(50):
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], {port})).send(b"here I am")
        break
    except OSError:
        time.sleep(0.1)
print("sent", sent_bytes())
"""
        sender = links.start(1, [sys.executable, "-c", send], port, tmp_path / "out")
        assert sender.wait(20) == 0 and listener.wait(20) == 0
        out = (tmp_path / "out").read_text()
        assert "rate 7Mbit" in out and int(out.split()[-1]) > 9
        assert (tmp_path / "log").read_text() == "here I am\n"
    finally:
        links.__exit__(None, None, None)
    assert namespaces() == before


@pytest.mark.network
@pytest.mark.slow
@needs_namespaces
def test_slow_network(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-layers", "1", "--hidden-size", "64", "--moe-ffn-hidden-size", "64", "--seq-length", "128"]
    words = [
        "--shares",
        "50",
        "--rates",
        "exact",
        "deduplicated",
        "0.2",
        "--wires",
        "model",
        "int8",
        "--repeats",
        "1",
        "--micro-batches",
        "1",
    ]
    slow_network.main([*words, "--flags", *flags])
    (measurement,) = json.loads((results / "slow_network.json").read_text())["measurements"]
    exact, exact_int8, once, once_int8, lsh, lsh_int8 = measurement["links"][0]["variants"]
    assert [v["variant"] for v in (exact, exact_int8, once, once_int8, lsh, lsh_int8)] == [
        "exact",
        "exact, int8",
        "de-duplicated",
        "de-duplicated, int8",
        "LSH 20%",
        "LSH 20%, int8",
    ]
    assert exact["speedup"] == 1.0 and exact["alltoall_share"] > 0.25
    assert lsh["bytes"] / exact["bytes"] == pytest.approx(0.2, abs=0.03) and lsh_int8["bytes"] < 0.3 * lsh["bytes"]
    assert 0.5 < once["bytes"] / exact["bytes"] < 0.95  # every rank is a node: two experts of one token on one rank
    assert lsh["lsh_ms"] > 0 == exact["lsh_ms"] and exact_int8["wire_ms"] > exact["wire_ms"]
    assert measurement["bytes"][0]["ratio"] == pytest.approx(1.0, abs=0.05)  # payload against the interfaces
    assert "one micro-batch" in capsys.readouterr().out


@pytest.mark.network
@pytest.mark.slow
@needs_namespaces
def test_peers(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "64", "--hidden", "32", "--ffn", "32", "--mbit", "0", "--repeats", "2"]
    peers.main(["--peers", "megatron_lsh, exact", "megatron_lsh, LSH 20%", "fairscale", *sizes])
    result = json.loads((results / "peers.json").read_text())
    assert {"megatron_lsh, exact", "megatron_lsh, LSH 20%"} <= set(result["versions"])
    assert "fairscale" in {**result["versions"], **result["skipped"]}
    assert "tokens/s, full speed" in capsys.readouterr().out


def test_errors_of_gradients_are_compared_with_their_noise() -> None:
    """Against errors that are known: the same in all micro-batches, and other noise of the same size."""
    generator = torch.Generator().manual_seed(0)
    noise = {kind: torch.randn(8, 1000, generator=generator) for kind in gradient_error.KINDS}
    exact = gradient_error.Found({kind: 3.0 + each for kind, each in noise.items()}, [2.0] * 8)
    off = gradient_error.compare(
        gradient_error.Found({k: g + 0.5 for k, g in exact.gradients.items()}, [2.5] * 8), exact
    )
    assert off["kept by the mean"] == pytest.approx(1.0) and off["of noise"] == pytest.approx(0.25, rel=0.05)
    assert off["experts"] == pytest.approx(0.25 / 10.0, rel=0.05) and off["loss"] == [0.5] * 8
    fresh = {kind: torch.randn(8, 1000, generator=generator) for kind in gradient_error.KINDS}
    other = gradient_error.compare(gradient_error.Found({k: 3.0 + g for k, g in fresh.items()}, [2.0] * 8), exact)
    assert other["of noise"] == pytest.approx(2.0, rel=0.05) and other["kept by the mean"] == pytest.approx(
        1 / 8, rel=0.1
    )
    results = {"10%": {"all": 0.4}, "20%": {"all": 0.1}, "20%, means": {"all": 0.3}}
    assert list(gradient_error.by_rate(results)) == [10.0, 20.0]
    assert gradient_error.power_of_rate(results) == pytest.approx(2.0)


def test_accuracies_of_pictures_are_compared_by_pairs(tmp_path: Path) -> None:
    mean, half = vision.paired([0.90, 0.91, 0.89], [0.91, 0.93, 0.92])
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(4.303 * 1.0 / 3**0.5))
    assert vision.paired([0.9], [0.91]) == (pytest.approx(1.0), None)
    options = argparse.Namespace(data=tmp_path, steps=7, lr=1e-3, pretrain_on=None)
    for dispatcher in vision.DISPATCHERS:
        words = [str(word) for word in vision.flags_for(dispatcher, 3, tmp_path, options)]
        cfg = validate(parse_args(words, SwinConfig), vision.RANKS)
        assert (cfg.training.train_iters, cfg.training.seed) == (7, 3)
