from __future__ import annotations

from datetime import datetime

from megatron_lsh.observing.log_line import LogLine, evaluation_line

LINE = LogLine(
    iteration=10,
    train_iters=100,
    consumed_samples=2560,
    iteration_time_ms=1234.56,
    learning_rate=1e-4,
    global_batch_size=256,
    losses={"lm loss": 1.2345678, "load_balancing_loss": 1.01, "z_loss": 0.0},
    grad_norm=0.98765,
    skipped=1,
    nan=1,
    time=datetime(2026, 8, 1, 12, 34, 56),
)


def test_golden() -> None:
    """Megatron-LM's line, character by character; a loss of zero has no field."""
    assert str(LINE) == (
        " [2026-08-01 12:34:56] iteration       10/     100 | consumed samples:         2560 | "
        "elapsed time per iteration (ms): 1234.6 | learning rate: 1.000000E-04 | global batch size:   256 | "
        "lm loss: 1.234568E+00 | load_balancing_loss: 1.010000E+00 | loss scale: 1.0 | grad norm: 0.988 | "
        "number of skipped iterations:   1 | number of nan iterations:   1 |"
    )


def test_throughput_and_params_norm_where_megatron_has_them() -> None:
    fields = str(LogLine(**{**LINE.__dict__, "tflops": 312.34, "params_norm": 12.3456})).split(" | ")
    assert fields[3] == "throughput per GPU (TFLOP/s/GPU): 312.3"
    assert fields[-3] == "params norm: 12.346"


def test_evaluation() -> None:
    rule, text, _ = evaluation_line("iteration 10", 2.0).split("\n")
    assert text == " validation loss at iteration 10 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | "
    assert rule == "-" * (len(text) + 1)
    assert "PPL: 4.851652E+08" in evaluation_line("iteration 1", 100.0)  # exp(20): the cap
