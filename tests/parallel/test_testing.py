"""run_distributed_test reports, and never hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_lsh.parallel.testing import run_distributed_test


def describe(word: str) -> tuple[str, int, int, float]:
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    return word, dist.get_rank(), torch.get_num_threads(), total.item()


def fail_on_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise KeyError("the needle")
    dist.barrier()


def hang() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(1000)


def die() -> None:
    os._exit(7)


def read_environment() -> str:
    return os.environ["MEGATRON_LSH_TEST_WORD"]


def unpicklable() -> object:
    return lambda: None


def test_returns_results_in_rank_order() -> None:
    assert run_distributed_test(describe, 3, "word") == [("word", rank, 1, 3.0) for rank in range(3)]


def test_passes_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("one", "two"):
        monkeypatch.setenv("MEGATRON_LSH_TEST_WORD", word)
        assert run_distributed_test(read_environment, 1) == [word]


def test_a_failure_names_the_rank_and_shows_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 raised\n(.|\n)*in fail_on_one(.|\n)*the needle"):
        run_distributed_test(fail_on_one, 2)


def test_a_hang_ends_at_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"within 1.5 s(.|\n)*rank 0 of 2 was killed"):
        run_distributed_test(hang, 2, timeout_s=1.5)
    assert time.monotonic() - start < 30


def test_a_death_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 of 1 died without a report .exit code 7"):
        run_distributed_test(die, 1)


def test_a_result_that_cannot_be_pickled_is_reported() -> None:
    with pytest.raises(AssertionError, match="cannot be pickled"):
        run_distributed_test(unpicklable, 1)
