from __future__ import annotations

import logging
import multiprocessing
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from megatron_lsh.data.cache import ArrayCache, Layout, Rows, cache_key

LAYOUT: Layout = {"a": ((3, 4), np.dtype("<i8")), "b": ((3,), np.dtype("<u2")), "empty": ((3, 0), np.dtype("<i4"))}


def rows() -> Rows:
    for i in range(3):
        yield np.arange(4) + 10 * i, np.array(i), np.zeros(0)


def check(arrays: dict[str, np.ndarray]) -> None:
    assert arrays["a"].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]
    assert arrays["b"].tolist() == [0, 1, 2] and arrays["empty"].shape == (3, 0)
    assert all(arrays[name].dtype == dtype for name, (_, dtype) in LAYOUT.items())


def never() -> Rows:
    raise AssertionError("must come from the cache")


def test_builds_once(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path / "new" / "cache")
    check(cache.get("key", LAYOUT, rows))
    check(cache.get("key", LAYOUT, never))
    assert [path.name for path in (tmp_path / "new" / "cache").iterdir()] == ["key"]
    check(ArrayCache(None).get("key", LAYOUT, rows))


def test_damaged_entry_is_built_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    cache.get("key", LAYOUT, rows)
    for damage in (b"", (tmp_path / "key" / "a.npy").read_bytes()[:-1]):
        (tmp_path / "key" / "a.npy").write_bytes(damage)
        check(cache.get("key", LAYOUT, rows))
        check(cache.get("key", LAYOUT, never))
    (tmp_path / "key" / "b.npy").unlink()
    check(cache.get("key", LAYOUT, rows))


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> Rows:
        yield next(rows())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ArrayCache(tmp_path).get("key", LAYOUT, fails)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_builds_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        check(ArrayCache(tmp_path / "file" / "cache").get("key", LAYOUT, rows))
    assert "cannot be written" in caplog.text and "--data-cache-path" in caplog.text


def test_key_depends_on_every_fact() -> None:
    keys = {cache_key(a=1, b=2), cache_key(a=2, b=1), cache_key(a=1), cache_key(a="1", b=2)}
    assert len(keys) == 4 and cache_key(a=1, b=2) == cache_key(b=2, a=1)


def slow_rows() -> Rows:
    for row in rows():
        time.sleep(0.02)
        yield row


def race(folder: Path, start: Barrier) -> None:
    for attempt in range(5):
        start.wait(60)
        check(ArrayCache(folder).get(f"key{attempt}", LAYOUT, slow_rows))


def test_processes_that_race(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=race, args=(tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"key{i}" for i in range(5)]
