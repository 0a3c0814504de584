"""Compiling: nvcc accepts every .cu without warnings, nothing spills, and an install never fails for lack of a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_lsh.ops import library

ROOT = Path(__file__).parent.parent.parent


def test_kernels_are_there_where_a_compiler_is(build: ModuleType) -> None:
    """Else most tests of this folder would be skipped without anybody noticing."""
    try:
        build.host_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    assert "cpu" in library.STATUS.devices, library.STATUS.missing["cpu"]


@pytest.mark.slow
def test_nvcc_compiles_every_kernel_into_registers(build: ModuleType) -> None:
    """For sm_80 and sm_90, warnings as errors; about twenty seconds, kept for the next run."""
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    jobs = build.cuda_jobs(nvcc, strict=True)
    assert {job.name for job in jobs} == {f"checked_{path.stem}" for path in build.SOURCES.glob("*.cu")}
    found = [
        kernel for output in build.run_all(jobs, build.work_folder()).values() for kernel in build.resources(output)
    ]
    assert {kernel.architecture for kernel in found} == {"sm_80", "sm_90"}
    for name in (
        "hash",
        "sort",
        "link",
        "cut",
        "regroup",
        "mma",
        "plain",
        "segment",
        "combine",
        "dots",
        "spread",
        "encode",
    ):
        assert any(f"{name}_kernel" in kernel.name for kernel in found), name
    assert not [kernel for kernel in found if kernel.spilled_bytes or kernel.stack_bytes]


def test_resources_are_read_from_ptxas(build: ModuleType) -> None:
    output = """
ptxas info    : Compiling entry function '_Z3oneILi8EEvPf' for 'sm_90'
ptxas info    : Function properties for _Z3oneILi8EEvPf
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 47 registers, used 1 barriers, 16 bytes cumulative stack size
"""
    assert build.resources(output) == [build.KernelResources("_Z3oneILi8EEvPf", "sm_90", 47, 32, 16)]


def test_loader_and_builder_agree_on_what_sources_are(build: ModuleType) -> None:
    assert library._sources_digest() == build.digest(build.SOURCES)


def test_without_compilers_there_is_a_reason(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_kernels_cpu.0123456789ab.so").write_bytes(b"")  # of an earlier build
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    outcome = build.build_into(tmp_path, ["cpu"])
    assert outcome == {"cpu": "no C++ compiler (c++, g++ or clang++) on this machine"}
    assert [path.name for path in tmp_path.iterdir()] == ["_kernels.txt"]
    status = library.load(tmp_path)
    assert "cpu" not in status.devices
    assert status.describe("cpu") == (
        "LSH kernels: none for cpu (no C++ compiler (c++, g++ or clang++) on this machine); plain PyTorch instead"
    )


def test_a_compiler_that_fails_gives_its_error(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "work_folder", lambda: tmp_path / "work")
    assert build.build_into(tmp_path, ["cpu"]) == {"cpu": "broken failed: x.cpp:1: error: no luck"}
    assert "no luck" in capfd.readouterr().err


def test_a_cpu_build_of_torch_needs_no_cuda_kernels(build: ModuleType, tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    assert build.build_into(tmp_path, ["cuda"]) == {"cuda": "this torch is a CPU build"}


def test_libraries_of_other_sources_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "_kernels_cpu.0123456789ab.so").write_bytes(b"not a library")
    assert "built from other sources" in library.load(tmp_path).missing["cpu"]


def test_libraries_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    (tmp_path / f"_kernels_cpu.{library._sources_digest()}.so").write_bytes(b"not a library")
    assert "cannot be loaded" in library.load(tmp_path).missing["cpu"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_setup_builds_in_place(tmp_path: Path) -> None:
    """What an editable install does, in a copy of the project."""
    for name in ("kernels", "megatron_lsh"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_kernels.txt")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    fake = tmp_path / "compiler"  # makes empty files: what is tested is where they go
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    fake.chmod(0o755)
    env = {**os.environ, "CXX": str(fake)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert "LSH kernels for cpu: built" in done.stdout
    assert len(list((tmp_path / "megatron_lsh" / "ops").glob("_kernels_cpu.*.so"))) == 1
