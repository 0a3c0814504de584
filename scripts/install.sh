#!/usr/bin/env bash
# Make or complete a virtual environment with PyTorch and this package in it. Called by the Makefile:
#     scripts/install.sh VENV [EXTRAS]           EXTRAS e.g. dev,data (see pyproject.toml)
#
# PyTorch is installed before everything else, so that no other package pulls in a build of it that does not fit:
#   * a torch >= 2.11 that the base Python can already import is used as it is (clusters and GPU images bring their own);
#   * with an NVIDIA GPU: the newest torch of the package index;
#   * without: the version below, the one the test suite runs on.
# Environment:
#     PYTHON       the interpreter to build on (default: the first of python3, python3.13 .. python3.10 that is new enough)
#     TORCH        the torch requirement, e.g. TORCH='torch==2.12.*'
#     TORCH_INDEX  a further package index to take torch from, e.g. PyTorch's own index of CPU-only wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TESTED_TORCH=torch==2.13.0
HAS_TORCH='import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11))'

venv=${1:?usage: scripts/install.sh VENV [EXTRAS]}
extras=${2:-}

say() { echo "[install] $*"; }
fail() {
    echo "[install] ERROR: $*" >&2
    exit 1
}

heartbeat=
trap '[ -z "$heartbeat" ] || kill "$heartbeat" 2>/dev/null || true' EXIT

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 among: ${PYTHON:-python3 python3.13 .. python3.10}. Install one, or name it: make PYTHON=/path/to/python3"
}

make_venv() {
    local python=$1 options=()
    if "$python" -c "import sys; sys.exit(sys.prefix != sys.base_prefix)" && "$python" -c "$HAS_TORCH" 2>/dev/null; then
        say "the base Python has a usable torch: the environment will share its packages"
        options+=(--system-site-packages)
    fi
    say "making $venv with $("$python" --version) ($(command -v "$python"))"
    "$python" -m venv "${options[@]}" "$venv" ||
        fail "'$python -m venv' failed. On Debian and Ubuntu it needs a package: apt install python3-venv"
}

pip_install() { # pip_install WHAT ARGUMENTS...
    local what=$1 start=$SECONDS log
    shift
    say "installing $what ..."
    log=$(mktemp)
    (while sleep 20; do say "  still at it, $((SECONDS - start)) s"; done) &
    heartbeat=$!
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1; then
        kill "$heartbeat"
        tail -n 30 "$log" >&2
        fail "pip could not install $what: see above, in full $log. Check the network and the disk, then run make again"
    fi
    kill "$heartbeat"
    rm -f "$log"
    say "installing $what: done in $((SECONDS - start)) s"
}

install_torch() {
    if "$venv/bin/python" -c "$HAS_TORCH" 2>/dev/null; then
        return
    fi
    local requirement=$TESTED_TORCH
    if nvidia-smi -L >/dev/null 2>&1; then
        requirement='torch>=2.11'
    fi
    requirement=${TORCH:-$requirement}
    pip_install "$requirement and numpy (the largest download)" "$requirement" numpy ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
    "$venv/bin/python" -c "$HAS_TORCH" || fail "torch cannot be imported, or is older than 2.11"
}

add_torchrun() { # a shared torch leaves its launcher in the base Python, which would start ranks without this package
    if [ ! -e "$venv/bin/torchrun" ]; then
        # shellcheck disable=SC2016  # for the shell that runs it
        printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m torch.distributed.run "$@"\n' >"$venv/bin/torchrun"
        chmod +x "$venv/bin/torchrun"
    fi
}

report() {
    "$venv/bin/python" - <<'PYTHON'
import shutil, subprocess, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(f"[install] ready: torch {torch.__version__}, {gpus} CUDA device(s)")
if not gpus and shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
    print("[install] WARNING: there is an NVIDIA GPU, but this torch cannot use it; runs will be on the CPU. "
          "Install a torch build that fits the driver: make clean-venv, then make TORCH=... TORCH_INDEX=...")
from megatron_lsh import ops
for device in ("cuda", "cpu") if gpus else ("cpu",):
    print(f"[install] {ops.describe(device)}")
PYTHON
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    make_venv "$python"
fi
install_torch
# Without build isolation: the package is built with the torch that it will run with.
"$venv/bin/python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null ||
    pip_install "setuptools" "setuptools>=77"
pip_install "megatron-lsh${extras:+ with $extras}" --no-build-isolation --editable ".${extras:+[$extras]}"
add_torchrun
report
