"""Gauges: declared once; documents, JSON lines and labels follow."""

import time

import pytest
import torch

from megatron_lsh.moe.gauges import Gauge, averaged, busiest, ratio, summed
from megatron_lsh.moe.instruments import DOCUMENT, with_table
from megatron_lsh.moe.layer import GAUGES
from megatron_lsh.moe.layer_pass import LayerPass, ReplayMemo
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context

CPU = torch.device("cpu")


def test_the_documents_table_is_that_of_the_declarations():
    text = DOCUMENT.read_text()
    assert text == with_table(text), "run python -m megatron_lsh.moe.instruments"


def test_every_gauge_says_what_it_is():
    names = [gauge.name for gauge in GAUGES]
    assert len(set(names)) == len(names)
    assert all(gauge.label and gauge.meaning for gauge in GAUGES)


def test_sums_become_figures():
    mine = (
        Gauge("total", "rows", "total", summed("a", "b")),
        Gauge("share", "share", "share", ratio("a", "b"), optional=True),
        Gauge("time", "ms", "time", averaged("b")),
        Gauge("most", "rows", "most", busiest("a")),
    )
    telemetry, ctx = MoETelemetry(CPU), offline_context(device="cpu")
    first, second = (telemetry.layer(number, 4, mine) for number in (3, 1))
    with telemetry.paused():
        LayerPass(first).add(a=100.0)
    LayerPass(first).add(a=1.0, b=torch.tensor(4.0))
    LayerPass(first).add(a=1.0)
    LayerPass(first).add_load(torch.tensor([1, 2, 3, 4]))
    low, high = telemetry.collect(ctx, iterations=2)
    assert (low.layer, high.layer) == (1, 3)
    assert dict(high.figures) == {"total": 3.0, "share": 0.5, "time": 2.0, "most": 1.0}
    assert dict(low.figures) == {"total": 0.0, "share": None, "time": 0.0, "most": 0.0}
    assert telemetry.collect(ctx, iterations=1)[1]["total"] == 0.0
    assert second.load_E.sum() == 0


def test_a_sum_that_no_gauge_reads_and_two_gauges_of_one_name_are_refused():
    telemetry = MoETelemetry(CPU)
    record = telemetry.layer(0, 4, (Gauge("rows", "rows", "rows", summed("rows")),))
    with pytest.raises(ValueError, match="no gauge is made of 'rowz'"):
        LayerPass(record).add(rowz=1)
    telemetry.layer(1, 4, (Gauge("rows", "rows", "rows", summed("rows")),))
    with pytest.raises(ValueError, match="two gauges named 'rows'"):
        telemetry.layer(0, 4, (Gauge("rows", "bytes", "rows", summed("rows")),))


def test_one_micro_batch_of_an_interval_is_timed_and_stands_for_all():
    """With its replay; counts are those of all micro-batches."""
    telemetry = MoETelemetry(CPU)
    gauges = [Gauge("took", "ms", "", averaged("took")), Gauge("rows", "", "", summed("rows"))]
    record = telemetry.layer(0, 2, gauges)
    for _interval in range(2):
        for micro_batch in range(4):
            memo = ReplayMemo()
            for _ in range(2):  # the pass and, after the micro-batch is counted, its replay
                p = LayerPass(record, memo)
                p.time("took", time.sleep, 0.002)
                began = p.clock()
                p.since(began, "took", rows=5)
                assert (began is None) == (micro_batch > 0)
                if not p.replay:
                    telemetry.count_micro_batch()
        (report,) = telemetry.collect(offline_context(device="cpu"), iterations=2)
        assert report["rows"] == 4 * 2 * 5 / 2
        assert report["took"] >= 4 * 2 * 2 / 2  # ms: two of the first micro-batch, times four
