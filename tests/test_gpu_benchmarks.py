"""What runs on a GPU runs here too, at a small size: the layer's figures, restoration's, and `make gpu`."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu, gpu_layer, restoration
from benchmarks.common import ROOT
from megatron_lsh.ops.library import STATUS

LAYER = "--device cpu --tokens 128 --hidden 16 --ffn 16 --topk 2 --repeats 1 --json --experts"


@pytest.mark.skipif("cpu" not in STATUS.devices, reason="without kernels refinement launches for each expert")
def test_the_layers_launches_do_not_grow_with_experts_and_it_waits_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for experts in (8, 64):
        gpu_layer.main([*LAYER.split(), str(experts)])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    eight, many = found
    assert 0 < many["launches_forward"] <= eight["launches_forward"]
    assert 0 < many["launches_backward"] <= eight["launches_backward"]
    assert all(each["waits"] == 1 and each["waits_backward"] == 0 for each in found)


def test_restoration_reports_both_forms(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_LSH_RESULTS", "build/gpu_dry_run")
    restoration.main(["--device", "cpu", "--blocks", "8", "--repeats", "1"])
    (path,) = (ROOT / line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines() if "wrote" in line)
    forms = json.loads(path.read_text())["shapes"]["small"]
    assert [each["form"] for each in forms] == list(restoration.FORMS)
    assert all(0 < each["error"] < 1e-4 for each in forms)


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["layers"])
    assert "part (layers) must be one of build, tests" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_runs_dry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEGATRON_LSH_RESULTS", "")  # restored afterwards
    assert gpu.main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    assert all(f"== {part}: passed" in output for part in gpu.PARTS)
