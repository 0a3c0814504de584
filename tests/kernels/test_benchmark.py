"""benchmarks/kernels.py runs and says what it should; its figures are not for here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels as benchmark
from megatron_lsh.ops import reference_only
from megatron_lsh.ops.library import ON_GPUS, SCHEMAS

pytestmark = pytest.mark.usefixtures("cpu_kernels")
SMALL = ["--rows", "128", "--hidden", "24", "--experts", "4", "--repeats", "2", "--threads", "1"]


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def write(name: str, result: dict) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result))
        return path

    monkeypatch.setattr(benchmark, "write_result", write)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda clock, device: 1e10)
    return tmp_path / "kernels.json"


def test_paths(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark.main(SMALL)
    finally:
        torch.set_num_threads(threads)
    (path,) = json.loads(result.read_text())["paths"]
    assert set(path["variants"]) == set(benchmark.VARIANTS)
    for variant in path["variants"].values():
        times = dict(variant["median"])
        assert times.pop("total") > 0 and set(times) <= set(benchmark.STAGES) and min(times.values()) > 0
    assert "times less" in capsys.readouterr().out


def test_ops(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        benchmark.main([*SMALL, "--ops", "--dtype", "bf16"])
    finally:
        torch.set_num_threads(threads)
    (ops,) = json.loads(result.read_text())["ops"].values()
    measured = {op["op"].split()[0] for op in ops}
    assert measured == set(SCHEMAS) - set(ON_GPUS)  # those are in the benchmark of restoration
    assert all(op["ms"] >= op["least_ms"] > 0 and op["bytes"] > 0 for op in ops)


def test_all_paths_compute_the_same() -> None:
    inputs = benchmark.Inputs(benchmark.Size(128, 24, 4), torch.device("cpu"), torch.float32)
    outputs = {}
    for name, (path_type, by_kernels) in benchmark.VARIANTS.items():
        path = path_type(inputs)
        context = benchmark.nullcontext() if by_kernels else reference_only()
        with context:
            for function in path.stages().values():
                function()
        outputs[name] = path.y
    # Experts are the identity here, and identity restores every row exactly.
    for y in outputs.values():
        torch.testing.assert_close(y, outputs["exact, plain"])
