"""Random streams: which ranks draw the same numbers, and how the state of all generators is saved."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_lsh.parallel.context import ParallelContext


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, the same on every machine and Python version."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int, ctx: ParallelContext) -> None:
    """Seed python, numpy and torch (CPU and CUDA) of this rank.

    Data and context parallel ranks and pipeline stages draw differently. Tensor parallel ranks draw differently under
    sequence parallelism, where each holds its own tokens, and equally without it, where dropout acts on the same activation
    on each of them; activations that are then split over the tensor parallel group (attention heads) use
    ``tensor_parallel_rng``.
    """
    tp_rank = ctx.tp.rank if ctx.sequence_parallel else 0
    stage = (ctx.pp.rank,) if ctx.pp.size > 1 else ()
    part = ("part", ctx.cp.rank) if ctx.cp.size > 1 else ()
    rank_seed = derive_seed(seed, "rank", ctx.dp.rank, tp_rank, *stage, *part)
    random.seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    torch.manual_seed(rank_seed)  # seeds CUDA as well, also when it is not initialised yet


@contextlib.contextmanager
def tensor_parallel_rng(ctx: ParallelContext) -> Iterator[None]:
    """Inside, torch draws differently on each tensor parallel rank; outside, it draws as ``seed_everything`` says.

    The stream inside is seeded from a number drawn outside, so there is no further state to save. A no-op where ranks
    draw differently anyway.
    """
    if ctx.tp.size == 1 or ctx.sequence_parallel:
        yield
        return
    common = int(torch.empty((), dtype=torch.int64).random_())
    with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(common, "tp", ctx.tp.rank))
        yield


def get_rng_state() -> dict[str, Any]:
    """State of every generator of this process, made of tensors, numbers and tuples (loads with weights_only=True)."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(algorithm), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo of ``get_rng_state``. A CUDA state is ignored where there is no GPU."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, np.asarray(keys.cpu(), dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
