"""Where the kernels under test come from: the CPU twins, the CUDA sources in an emulator, a GPU where there is one."""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_lsh.ops.kernels import KernelOps
from megatron_lsh.ops.library import STATUS, define

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def load_build_module() -> ModuleType:
    """kernels/build.py, which is not part of the package."""
    if "kernels_build" not in sys.modules:
        spec = importlib.util.spec_from_file_location("kernels_build", ROOT / "kernels" / "build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels_build"] = module
        spec.loader.exec_module(module)
    return sys.modules["kernels_build"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops."""

    name: str
    ops: Any
    device: str

    @property
    def functions(self) -> KernelOps:
        """As ``choose`` would give them."""
        return KernelOps(self.ops)

    @property
    def dtypes(self) -> list[torch.dtype]:
        floats = [torch.float32, torch.bfloat16, torch.float16]
        return [*floats, torch.float64] if self.name == "cpu" else floats

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"{dtype} is for the CPU twin")


@pytest.fixture(scope="session")
def build() -> ModuleType:
    return load_build_module()


@functools.cache  # a library is registered once
def _emulated(build: ModuleType) -> Backend:
    """The .cu files compiled as C++ (about ten seconds, kept for the next run).

    The planning kernels get few threads, so that a few hundred rows already take several tiles.
    """
    work = build.work_folder() / "emulated"
    library = work / "emulated.so"
    try:
        build.build_emulated(library, work, HERE, flags=["-DLSH_PLAN_THREADS=64"])
    except build.BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    define("megatron_lsh_emulated")
    torch.ops.load_library(str(library))
    return Backend("emulated", torch.ops.megatron_lsh_emulated, "cpu")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest, build: ModuleType) -> Backend:
    if request.param == "emulated":
        return _emulated(build)
    if request.param not in STATUS.devices:
        pytest.skip(STATUS.describe(request.param))
    return Backend(request.param, torch.ops.megatron_lsh, request.param)


@pytest.fixture(scope="session")
def on_gpu(request: pytest.FixtureRequest, build: ModuleType) -> Backend:
    """For ops that have no CPU twin."""
    return _emulated(build) if request.param == "emulated" else Backend("cuda", torch.ops.megatron_lsh, "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    gpus = ["emulated"]
    if torch.cuda.is_available():
        gpus.append(pytest.param("cuda", marks=pytest.mark.gpu))  # type: ignore[arg-type]
    for fixture, parameters in (("backend", ["cpu", *gpus]), ("on_gpu", gpus)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, parameters, indirect=True, scope="session")


@pytest.fixture
def cpu_kernels() -> None:
    if "cpu" not in STATUS.devices:
        pytest.skip(STATUS.describe("cpu"))
