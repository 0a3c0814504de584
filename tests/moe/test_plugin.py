"""The dispatcher of CONTRIBUTING.md, as it stands there: with schedules, exact evaluation, recomputation and two ranks."""

import re
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe.layer_pass import ReplayMemo
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.observing.metrics import IntervalMetrics
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import local
from megatron_lsh.parallel.testing import run_distributed_test
from tests.moe.test_dispatchers import make_layer, run, single, tokens

PLUGIN = "large_rows_of_the_documents"


def write_plugin(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert not re.search(r"[.\s]_[a-z]", code), "an example uses public names only"
    (folder / f"{PLUGIN}.py").write_text(code)


def on_two_ranks(folder: str) -> list[float]:
    sys.path.insert(0, folder)
    ctx = initialize(ParallelConfig(expert_model_parallel_size=2))
    x, name = tokens(ctx.rank), f"{PLUGIN}:large_rows"
    lsh = LSHConfig(lsh_warmup_iters=2, lsh_probe_interval=1)
    layer, telemetry = make_layer(ctx, name, lsh)
    exact = run(make_layer(ctx, "alltoall")[0], x)

    layer.set_iteration(1, total=10)  # still warming up
    warm = run(layer, x)
    assert all(torch.equal(warm[key], exact[key]) for key in exact)
    telemetry.collect(ctx, iterations=1)

    layer.set_iteration(2, total=10)
    direct = run(layer, x)
    assert not torch.equal(direct["y"], exact["y"])
    (report,) = telemetry.collect(ctx, iterations=1)
    assert 0.3 < report["rows_kept"] < 0.7 and 0.0 < report["lsh_restored_error"] < 1.0
    assert report["alltoall_bytes"] < 0.8 * report["alltoall_bytes_uncompressed"]
    record = interval(report).record(per_layer=True)
    assert record["rows_kept"] == report["rows_kept"] and record["rows_kept_per_layer"] == [report["rows_kept"]]

    memo = ReplayMemo()
    y, aux = checkpoint(lambda inputs: layer(inputs, None, memo), x, use_reentrant=False)
    grads = torch.autograd.grad(y.pow(2).mean() + aux, [x, *layer.parameters()])
    for got, expected in zip([y, aux, *grads], direct.values(), strict=True):
        assert torch.equal(local(got), expected)

    with exact_dispatch(layer):
        assert torch.equal(layer(x)[0], exact["y"])
    nobody = torch.zeros(x.shape[:2], dtype=torch.bool)
    assert all(value.isfinite().all() for value in run(layer, x, nobody if ctx.rank == 0 else ~nobody).values())
    return [report["rows_kept"]]


def interval(*layers) -> IntervalMetrics:
    return IntervalMetrics(
        iteration=1, iterations=1, train_iters=1, consumed_samples=1, global_batch_size=1, lm_loss=1.0, grad_norm=1.0,
        learning_rate=1.0, iteration_time_ms=1.0, tokens_per_second=1.0, tflops=1.0, mfu=None, layers=layers,
    )  # fmt: skip


def test_a_dispatcher_of_another_package(tmp_path):
    write_plugin(tmp_path)
    run_distributed_test(on_two_ranks, 2, str(tmp_path))


def test_it_needs_no_process_group(tmp_path, monkeypatch):
    write_plugin(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    layer, _ = make_layer(single(), f"{PLUGIN}:large_rows")
    assert run(layer, tokens(0))["x"].isfinite().all()
