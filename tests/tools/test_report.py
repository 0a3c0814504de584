"""tools/report.py and megatron_lsh/observing/report/."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_lsh.config import parse_args, to_dict, validate
from megatron_lsh.config.serialize import positions_per_sample
from megatron_lsh.errors import DataError
from megatron_lsh.families import BERT, GPT, T5, Family
from megatron_lsh.observing.report.charts import (
    Series,
    line_chart,
    padded,
    short,
    stacked_bars,
    thinned,
    tick_words,
    ticks,
)
from megatron_lsh.observing.report.page import render
from megatron_lsh.observing.report.runs import REST, RunData, differing_settings, read_run, read_runs
from tests.data.helpers import run_tool


def record(iteration: int, lsh: bool) -> dict[str, Any]:
    """As observing/metrics.py writes it, with two MoE layers."""
    values: dict[str, Any] = {
        "iteration": iteration, "consumed_samples": 8 * iteration, "lm_loss": 8.0 / iteration, "iteration_time_ms": 100.0,
        "tokens_per_second": 1e3, "alltoall_bytes": 1e6 if lsh else 5e6, "alltoall_time_ms": 10.0 if lsh else 40.0,
        "alltoall_share": 0.1 if lsh else 0.4, "wire_time_ms": 0.0, "experts_time_ms": 5.0, "moe_layers": [1, 3],
        "expert_load_max_over_mean": 1.2, "lsh_compression_rate": 0.2 if lsh else None,
        "lsh_residual_energy": 0.3 if lsh else None, "lsh_restored_error": 0.1 if lsh and iteration % 4 == 0 else None,
    }  # fmt: skip
    for stage in ("hash", "cluster", "refine", "compress", "restore"):
        values[f"lsh_{stage}_time_ms"] = 2.0 if lsh else None
    rates = [0.2, 0.21] if lsh else [None, None]
    return values | {"lsh_compression_rate_per_layer": rates, "alltoall_time_ms_per_layer": [4.0, 6.0]}


def write_run(folder: Path, lsh: bool, iterations: int = 10) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for iteration in range(2, iterations + 1, 2):
        lines.append(record(iteration, lsh))
        if iteration == 4:
            lines.append({"iteration": 5, "validation_loss": 2.5, **({"validation_loss_exact": 2.4} if lsh else {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 12, "lm_')
    (folder / "checkpoints").mkdir()
    dispatcher = "lsh" if lsh else "alltoall"
    config = {
        "model": {"seq_length": 16},
        "moe": {"moe_token_dispatcher_type": dispatcher},
        "logging": {"log_interval": lsh},
    }
    (folder / "checkpoints" / "config.json").write_text(json.dumps({"config": config}))
    return folder


class Checker(HTMLParser):
    """Collects what a page refers to, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.references == []
    assert "script" not in checker.seen and not re.search(r"url\((?!#)|@import|https?:", page)
    assert "nan" not in page.lower().split("<style>")[0] and not re.search(r'"(nan|inf)|[ ,](nan|inf)[ ,"]', page)
    return checker


def test_a_run_that_ended_without_a_loss_has_none() -> None:
    """Not the one that it had before: null is what a number becomes that is not finite."""
    evaluations = [{"iteration": 2, "validation_loss": 3.0}, {"iteration": 4, "validation_loss": None}]
    run = RunData("diverged", [{"iteration": 4, "lm_loss": None}], evaluations)
    assert run.last("validation_loss") is None and run.last("iteration") == 4 and run.last("validation_top1") is None
    assert run.curve("validation_loss") == [(2, 3.0)]
    later = RunData(
        "with a test", [], [*evaluations, {"iteration": 4, "test_loss": 2.0}, {"iteration": 4, "validation_loss": 1.0}]
    )
    assert later.last("validation_loss") == 1.0 and later.last("test_loss") == 2.0


def test_page_of_two_runs_stands_alone(tmp_path: Path) -> None:
    places = [write_run(tmp_path / "exact", lsh=False), write_run(tmp_path / "l<s>h", lsh=True)]
    done = run_tool("report", *places, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert check(page).seen.count("svg") >= 4 + 1 + 3 + 2  # losses, breakdown, during training, by layer
    assert "l&lt;s&gt;h" in page and "moe.moe_token_dispatcher_type" in page
    assert "LSH: refine 2 ms, 2.0% of the step" in page and "0.20 x" in page
    for missing in ("logging.log_interval", "LSH: wire"):
        assert missing not in page


def test_pictures_are_judged_by_first_and_fifth_places(tmp_path: Path) -> None:
    places = [write_run(tmp_path / name, lsh=name == "lsh") for name in ("exact", "lsh")]
    for number, place in enumerate(places):
        with (place / "metrics.jsonl").open("a") as metrics:
            top = {"validation_top1": 0.943 - 0.013 * number, "validation_top5": 1.0}
            metrics.write("\n" + json.dumps({"iteration": 10, "validation_loss": 0.2, **top}) + "\n")
    page = render(read_runs(places), "Swin")
    check(page)
    assert ">94.3%<" in page and '>93.0% <span class="change">-1.3<' in page and ">top-5<" in page
    assert "validation top1" in page and "nats per token" not in page


def test_page_of_the_least_there_can_be(tmp_path: Path) -> None:
    """One dense run with one log line, no configuration."""
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"iteration": 1, "consumed_samples": 8, "lm_loss": 3.0, "iteration_time_ms": 5.0, "alltoall_bytes": 0.0}\n'
    )
    check(render([read_run(path)], "alone"))


def test_a_run_that_skipped_everything_so_far_takes_no_page_down(tmp_path: Path) -> None:
    good = read_run(write_run(tmp_path / "good", lsh=True))
    for name, evaluation in (("skipped", None), ("judged", {"iteration": 5, "validation_loss": 2.5})):
        lines = [record(iteration, True) | {"lm_loss": None} for iteration in (2, 4)] + [evaluation] * (
            evaluation is not None
        )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = read_run(tmp_path / f"{name}.jsonl")
        check(render([run], "alone"))
        check(render([good, run], "both"))


def test_settings_of_another_run_are_not_taken(tmp_path: Path) -> None:
    """Two files of metrics beside a folder that is a run of its own."""
    write_run(tmp_path / "other", lsh=True)
    for name in ("exact", "lsh"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record(2, True)) + "\n")
        run = read_run(tmp_path / f"{name}.jsonl")
        assert run.config == {} and run.tokens_per_sample is None and run.curve("lm_loss", "tokens") == [(0.0, 4.0)]


@pytest.mark.parametrize("family", [GPT, T5, BERT])
def test_tokens_are_counted_as_in_the_log(family: Family) -> None:
    lengths = {"t5": "--encoder-seq-length 16 --decoder-seq-length 8"}.get(family.name, "--seq-length 16")
    words = f"--hidden-size 32 --num-attention-heads 4 --num-layers 2 --micro-batch-size 1 --dry-run {lengths}"
    cfg = validate(parse_args(words.split(), family.config), 1)
    assert positions_per_sample(to_dict(cfg)["config"]) == family.tokens_per_sample(cfg)


def test_curves(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", lsh=True))
    assert run.name == "run" and run.tokens_per_sample == 16
    assert run.curve("lm_loss", "tokens")[0] == (2 * 8 * 16, 4.0)
    assert run.curve("lm_loss", "seconds")[-1] == (pytest.approx(1.0), 0.8)
    assert run.curve("lm_loss", "bytes")[1] == (pytest.approx(4e6), 2.0)
    assert run.curve("validation_loss", "bytes") == [(pytest.approx(5e6), 2.5)]  # between two log lines
    assert [x for x, _ in run.curve("lsh_restored_error")] == [4, 8]
    assert run.per_layer("lsh_compression_rate") == [(1.0, 0.2), (3.0, 0.21)]
    assert run.per_layer("lsh_residual_energy") == []
    parts = run.breakdown()
    assert sum(parts.values()) == pytest.approx(100.0) and parts[REST] == pytest.approx(75.0)
    again = read_runs([tmp_path / "run", write_run(tmp_path / "b" / "run", lsh=False)])
    assert [r.name for r in again] == [f"{tmp_path.name}/run", "b/run"]
    assert differing_settings(again) == {"moe.moe_token_dispatcher_type": ["lsh", "alltoall"]}


def test_what_cannot_be_read(tmp_path: Path) -> None:
    done = run_tool("report", tmp_path)
    assert done.returncode == 1 and "start runs with --metrics-jsonl" in done.stderr
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(DataError, match="--log-interval"):
        read_run(tmp_path)


def test_axes() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(5.2, 8.4) == [6.0, 7.0, 8.0] and ticks(3.0, 3.0) == [3.0]
    assert [short(v) for v in (0, 0.04213, 12.345, 1234.5, 123456, 2.5e9)] == [
        "0",
        "0.0421",
        "12.3",
        "1234",
        "123k",
        "2.5G",
    ]
    assert [short(v) for v in (999_700, 999.7e6, 9.997e11, 9_996)] == ["1M", "1G", "1T", "10k"]
    assert len(set(ticks(0.0, 5e-13))) == len(ticks(0.0, 5e-13)) == 6
    assert [short(v) for v in (1e-4, -2.5e-7)] == ["1e-4", "-2.5e-7"]
    assert tick_words([0.2012, 0.2014]) == ["0.2012", "0.2014"]
    assert padded(1.0, 10.0)[0] == 0.0 and padded(0.0, 0.0) == (0.0, 1.0)
    low, high = padded(0.201, 0.203)
    assert high - low > 0.03
    line = [(float(i), float(i % 7)) for i in range(10_000)]
    assert len(thinned(line)) == 300 and thinned(line)[0][1] == pytest.approx(3.0, abs=0.5)
    log = line_chart([Series("falls", 0, [(0, 1e4), (1, 1e-2)])], x_label="x", y_label="y")
    assert ">10k<" in log and ">0.01<" in log
    assert stacked_bars([("run", {"a": 0.0})], ["a"], "ms").startswith("<svg")


def test_a_gauge_of_a_plug_in_is_on_the_page_and_ours_are_called_as_declared(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", lsh=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = [
        line | {"rows_kept": 0.5, "rows_kept_per_layer": [0.4, 0.6]} if "lm_loss" in line else line for line in lines
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    page = render([read_run(folder)], "title")
    assert page.count("rows kept") == 4  # during training and by layer, each on its axis and for who cannot see it
    assert "all-to-all, ms per step" in page and "error of restored outputs" in page
