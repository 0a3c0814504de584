"""Waiting for one another without a time limit."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.parallel import agreement
from megatron_lsh.parallel.agreement import unhurried_barrier
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test


def slow_rank(seconds: float) -> tuple[bool, float, str]:
    """(whether a barrier with a time limit ends with an error, seconds waited in the other, what is said meanwhile)."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    agreement.logger.addHandler(handler)
    agreement.NOTICE_S = seconds / 4  # type: ignore[misc]  # of this process alone
    ctx = initialize(ParallelConfig(device="cpu"))
    hurried = dist.new_group(timeout=timedelta(seconds=seconds / 2))
    wait = unhurried_barrier(ctx, "the index of the data")
    if ctx.rank == 0:
        time.sleep(seconds)
    begin = time.monotonic()
    wait()
    waited = time.monotonic() - begin
    late = False
    if ctx.rank == 1:
        try:
            dist.barrier(group=hurried)  # nobody else comes
        except RuntimeError:
            late = True
    return late, waited, "\n".join(records)


def test_a_slow_rank_is_waited_for_beyond_the_time_out() -> None:
    (_, first, _), (late, second, said) = run_distributed_test(slow_rank, 2, 2.0)
    assert late and first < second and second > 1.0
    assert "waiting for the index of the data on another rank, for 1 min so far" in said


def lost_rank() -> bool:
    """Whether rank 1 learns at once that rank 0 is gone."""
    ctx = initialize(ParallelConfig(device="cpu"))
    wait = unhurried_barrier(ctx, "nobody")
    if ctx.rank == 0:
        time.sleep(0.5)
        os._exit(0)
    with pytest.raises(RuntimeError):
        wait()
    return True


def test_a_rank_that_is_gone_ends_the_wait() -> None:
    with pytest.raises(AssertionError) as failure:
        run_distributed_test(lost_rank, 2)
    assert "rank 0" in str(failure.value) and "rank 1" not in str(failure.value)  # rank 1 saw what it should


def test_one_rank_waits_for_nobody() -> None:
    unhurried_barrier(offline_context(), "nobody")()
