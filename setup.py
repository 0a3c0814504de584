"""Builds the kernels along with the package; everything else is in pyproject.toml.

The CPU twins need a C++ compiler, the CUDA kernels nvcc and a CUDA build of torch; both need the torch that they will run
with, hence ``pip install --no-build-isolation``. Where something is missing the package installs without those kernels,
says so in one line, and runs plain PyTorch instead.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_builder():
    spec = importlib.util.spec_from_file_location("kernels_build", ROOT / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels_build"] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Runs kernels/build.py instead of setuptools' own compiler calls."""

    def run(self) -> None:
        parent = ROOT if self.inplace else Path(self.build_lib)
        folder = parent / "megatron_lsh" / "ops"
        folder.mkdir(parents=True, exist_ok=True)
        for kind, reason in load_builder().build_into(folder).items():
            print(f"LSH kernels for {kind}: {'built' if reason is None else f'not built ({reason})'}", flush=True)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "megatron_lsh" / "ops"
        return [] if self.inplace else [str(path) for path in folder.glob("_kernels*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# One nominal extension, so that setuptools runs build_ext and marks wheels as specific to a platform.
setup(ext_modules=[Extension("megatron_lsh.ops._kernels", [])], cmdclass={"build_ext": BuildKernels})
