"""Compile the kernels. setup.py and the tests call these functions; by hand:

    python kernels/build.py cpu      build the CPU twins into megatron_lsh/ops/
    python kernels/build.py cuda     build the CUDA kernels there (needs nvcc and a CUDA build of torch)
    python kernels/build.py check    compile every .cu for sm_80 and sm_90 and print registers and spills (needs only nvcc)

Environment: CXX, CUDA_HOME, MAX_JOBS (compilers at a time).

torch.utils.cpp_extension cannot do this: it gives every source one set of flags, where the loops are compiled once for each
instruction set; it compiles side by side only with ninja; it refuses .cu without a CUDA build of torch, which checking them
does not need; and what it cannot build it raises, where an install goes on and leaves the reason.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
PACKAGE = SOURCES.parent / "megatron_lsh" / "ops"
TESTS = SOURCES.parent / "tests" / "kernels"
CUDA_SOURCES = ("hash", "plan", "nearest", "segment", "members", "combine", "differences", "wire")
GPU_BINDINGS = ("bindings", "bindings_differences")
CUDA_ARCHITECTURES = ("80", "90")

# One binary for every torch from 2.11 on: only the stable interface is used.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_HOST_FLAGS = ("-std=c++17", "-fPIC", "-Wall", "-Wextra")
_LOOP_FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
# GCC would turn the clearing of an accumulator into a call that costs more than the sum.
_GCC_LOOP_FLAGS = ("-fno-tree-loop-distribute-patterns",)
_X86_LEVELS = {"base": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512")}


class BuildError(Exception):
    """The kernels cannot be built here; the message is one line that says why."""


@dataclass(frozen=True)
class Job:
    """One compiler call."""

    name: str
    command: tuple[str, ...]

    def run(self, work: Path) -> str:
        """Compile into ``work`` unless nothing has changed since. Returns what the compiler printed."""
        out, log = work / f"{self.name}.o", work / f"{self.name}.log"
        command = (*self.command, "-o", str(out))
        identity = f"{digest(SOURCES, TESTS)} {' '.join(command)}\n"
        if not (out.exists() and log.exists() and log.read_text().startswith(identity)):
            log.unlink(missing_ok=True)
            output = execute(command)
            log.write_text(identity + output)
        return log.read_text().removeprefix(identity)


def digest(*folders: Path) -> str:
    """Identifies the C++ and CUDA files of these folders. The loader in megatron_lsh/ops/library.py computes the same."""
    files = [p for folder in folders for p in sorted(folder.glob("*")) if p.suffix in (".cpp", ".cu", ".cuh", ".h")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def execute(command: Iterable[str]) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output = done.stdout + done.stderr
    if done.returncode:
        first = next((line for line in output.splitlines() if "error" in line), output.strip().splitlines()[-1:] or "")
        raise BuildError(f"{Path(next(iter(command))).name} failed: {first}\n{output}")
    return output


def run_all(jobs: list[Job], work: Path) -> dict[str, str]:
    """Run compilers side by side. Returns the output of each."""
    work.mkdir(parents=True, exist_ok=True)
    workers = int(os.environ.get("MAX_JOBS") or min(8, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip([job.name for job in jobs], pool.map(lambda job: job.run(work), jobs), strict=True))


def host_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler ({wanted or 'c++, g++ or clang++'}) on this machine")


def is_gcc(compiler: str) -> bool:
    return "Free Software Foundation" in execute([compiler, "--version"])


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return candidate
    raise BuildError("no nvcc on this machine")


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise BuildError("torch is not importable while building; install with --no-build-isolation") from error
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        raise BuildError(f"torch {torch.__version__} is older than 2.11")
    return Path(torch.__file__).parent


def torch_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise BuildError("this torch is a CPU build")
    return torch.version.cuda


def cpu_jobs(torch_include: Path) -> list[Job]:
    compiler = host_compiler()
    loop_flags = (*_LOOP_FLAGS, *_GCC_LOOP_FLAGS) if is_gcc(compiler) else _LOOP_FLAGS
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    dispatch = () if x86 else ("-DLSH_BASE_ONLY",)
    with_torch = (compiler, *_HOST_FLAGS, "-O2", _TORCH_TARGET, *dispatch, "-isystem", str(torch_include), "-c")
    jobs = [Job(f"cpu_{name}", (*with_torch, str(SOURCES / f"{name}.cpp"))) for name in ("bindings", "cpu")]
    for isa, isa_flags in (_X86_LEVELS if x86 else {"base": ()}).items():
        # Rows must round products and sums as torch does; matrix products are better off fused.
        for name, contract in (("cpu_rows", "off"), ("cpu_matrix", "fast")):
            flags = (*_HOST_FLAGS, *loop_flags, *isa_flags, f"-ffp-contract={contract}", f"-DLSH_ISA={isa}")
            jobs.append(Job(f"{name}_{isa}", (compiler, *flags, "-c", str(SOURCES / f"{name}.cpp"))))
    return jobs


def cuda_jobs(nvcc: str, strict: bool = False) -> list[Job]:
    """One job for each .cu. PTX of the last architecture serves GPUs that are newer still.

    Args:
        strict: warnings are errors. For our own checks; a user's compiler may know warnings that ours does not.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
    errors = ("-Werror", "all-warnings") if strict else ()
    flags = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-Xptxas", "-v", *errors)
    prefix = "checked" if strict else "cuda"
    return [Job(f"{prefix}_{n}", (nvcc, *flags, *targets, "-c", str(SOURCES / f"{n}.cu"))) for n in CUDA_SOURCES]


def link(command: Iterable[str], out: Path) -> None:
    """Link a shared library and put it into place in one step: other processes may load it at this moment."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f"{out.name}.{os.getpid()}")
    execute([*command, "-o", str(new)])
    os.replace(new, out)


def build_cpu(out: Path, work: Path) -> None:
    """Build the CPU twins as the shared library ``out``. Raises BuildError."""
    torch = torch_folder()
    jobs = cpu_jobs(torch / "include")
    run_all(jobs, work)
    objects = [str(work / f"{job.name}.o") for job in jobs]
    link([host_compiler(), "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"], out)


def build_cuda(out: Path, work: Path) -> None:
    """Build the CUDA kernels as the shared library ``out``. Raises BuildError."""
    torch, wanted, nvcc = torch_folder(), torch_cuda(), find_nvcc()
    version = re.search(r"release (\d+\.\d+)", execute([nvcc, "--version"]))
    if version and version[1].split(".")[0] != wanted.split(".")[0]:
        raise BuildError(f"nvcc is of CUDA {version[1]}, torch of CUDA {wanted}")
    flags = (*_HOST_FLAGS, "-O2", _TORCH_TARGET, "-DLSH_ON_GPU", "-isystem", str(torch / "include"), "-c")
    jobs = [Job(f"cuda_{name}", (host_compiler(), *flags, str(SOURCES / f"{name}.cpp"))) for name in GPU_BINDINGS]
    jobs += cuda_jobs(nvcc)
    run_all(jobs, work)
    objects = [str(work / f"{job.name}.o") for job in jobs]
    libraries = (f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda")
    link([nvcc, "-shared", "-cudart", "static", *objects, *libraries], out)


def build_emulated(out: Path, work: Path, emulator: Path, flags: Iterable[str] = ()) -> None:
    """Build the CUDA kernels as ordinary C++ that runs on the CPU, for tests. ``emulator`` is the folder of emulator.h."""
    torch, compiler = torch_folder(), host_compiler()
    warnings = ("-Werror", "-Wno-unknown-pragmas", *(("-Wno-clobbered",) if is_gcc(compiler) else ()))
    defines = ("-U_FORTIFY_SOURCE", "-DLSH_EMULATED", *flags)
    common = (*_HOST_FLAGS, *warnings, "-O1", *defines, "-I", str(emulator), "-c")
    jobs = [Job(f"emulated_{n}", (compiler, *common, "-x", "c++", str(SOURCES / f"{n}.cu"))) for n in CUDA_SOURCES]
    with_torch = (compiler, *common, _TORCH_TARGET, "-isystem", str(torch / "include"))
    jobs += [Job(f"emulated_{name}", (*with_torch, str(SOURCES / f"{name}.cpp"))) for name in GPU_BINDINGS]
    run_all(jobs, work)
    objects = [str(work / f"{job.name}.o") for job in jobs]
    link([compiler, "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu"], out)


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports of one kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    spilled_bytes: int
    stack_bytes: int  # arrays that are indexed at run time


def resources(ptxas_output: str) -> list[KernelResources]:
    """Parse the output of ``-Xptxas -v``."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        KernelResources(m["name"], m["arch"], int(m["registers"]), int(m["stores"]) + int(m["loads"]), int(m["stack"]))
        for m in pattern.finditer(ptxas_output)
    ]


def work_folder() -> Path:
    """Object files, kept for the next build."""
    return SOURCES.parent / "build" / f"kernels-{sysconfig.get_platform()}"


BUILDERS: dict[str, Callable[[Path, Path], None]] = {"cpu": build_cpu, "cuda": build_cuda}


def build_into(folder: Path, kinds: Iterable[str] = tuple(BUILDERS)) -> dict[str, str | None]:
    """Build what can be built here, replacing what was built before.

    Returns:
        For each kind None, or the reason why it is not there, in one line. Reasons are also left in ``_kernels.txt``, for
        the package to tell its users.
    """
    outcome: dict[str, str | None] = {}
    for kind in kinds:
        # The name tells which sources a library was built from, so that the loader notices an outdated one.
        library = folder / f"_kernels_{kind}.{digest(SOURCES)}.so"
        try:
            BUILDERS[kind](library, work_folder())
            outcome[kind] = None
        except BuildError as error:
            outcome[kind] = str(error).splitlines()[0]
            print(error, file=sys.stderr)
        for old in folder.glob(f"_kernels_{kind}.*.so"):
            if old != library or outcome[kind]:
                old.unlink()
    report = folder / "_kernels.txt"
    report.write_text("".join(f"{kind}: {reason}\n" for kind, reason in outcome.items() if reason))
    return outcome


def main() -> None:
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what in BUILDERS:
        (reason,) = build_into(PACKAGE, [what]).values()
        sys.exit(f"{what} kernels not built: {reason}" if reason else 0)
    if what != "check":
        sys.exit(__doc__)
    try:
        outputs = run_all(cuda_jobs(find_nvcc(), strict=True), work_folder())
    except BuildError as error:
        sys.exit(f"kernels do not compile: {error}")
    for output in outputs.values():
        for k in resources(output):
            used = f"{k.registers:4d} registers {k.spilled_bytes:5d} B spilled {k.stack_bytes:5d} B of stack"
            print(f"{k.architecture} {used}  {k.name}")


if __name__ == "__main__":
    main()
