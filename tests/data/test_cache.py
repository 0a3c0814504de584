from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.cache import CHECKSUMS, OWNER, ArrayCache, Layout, Rows, cache_key
from megatron_lsh.parallel.owner import Owner

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


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """A damage that replaces the content of one file of an entry."""
    return lambda entry: (entry / name).write_bytes(change((entry / name).read_bytes()))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": _bytes("a.npy", lambda old: b""),
    "cut off": _bytes("a.npy", lambda old: old[:-1]),
    "longer": _bytes("a.npy", lambda old: old + b"x"),
    "zeros": _bytes("a.npy", lambda old: old[:128] + bytes(len(old) - 128)),
    "header": _bytes("b.npy", lambda old: old[:10] + b"(" * 118 + old[128:]),
    "another array": lambda entry: np.save(entry / "b.npy", np.arange(1, 4, dtype="u2")),
    "archive": lambda entry: np.savez(open(entry / "b.npy", "wb"), a=np.zeros(3)),  # noqa: SIM115
    "pickle": lambda entry: np.save(entry / "b.npy", np.array([{}], dtype=object), allow_pickle=True),
    "missing": lambda entry: (entry / "b.npy").unlink(),
    "folder": lambda entry: ((entry / "b.npy").unlink(), (entry / "b.npy").mkdir()),
    "no checksums": lambda entry: (entry / CHECKSUMS).unlink(),
    "checksums": _bytes(CHECKSUMS, lambda old: b"[" * 100_000),
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_text("x")),
    "a link": lambda entry: (entry.rename(entry.with_name("moved")), entry.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = ArrayCache(tmp_path)
    cache.get("key", LAYOUT, rows)
    DAMAGES[damage](tmp_path / "key")
    check(cache.get("key", LAYOUT, rows))
    assert "key is damaged" in caplog.text
    check(cache.get("key", LAYOUT, never))


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["a.npy", "b.npy", "empty.npy", CHECKSUMS]), st.data())
def test_no_flipped_bit_goes_unnoticed(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = ArrayCache(folder)
        cache.get("key", LAYOUT, rows)
        content = bytearray((Path(folder) / "key" / name).read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (Path(folder) / "key" / name).write_bytes(content)
        check(cache.get("key", LAYOUT, rows))


def test_entry_of_another_key_is_built_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    cache.get("other", LAYOUT, lambda: ((2 * a, b, c) for a, b, c in rows()))
    (tmp_path / "other").rename(tmp_path / "key")
    check(cache.get("key", LAYOUT, rows))


def test_what_killed_builders_left_is_removed_and_what_live_ones_build_is_not(tmp_path: Path) -> None:
    """On one machine the process decides, not the clock, which may be set forward by days; elsewhere a day of silence."""
    day, me = 24 * 3600, Owner.here()
    elsewhere = replace(me, boot="another", host="another")
    builders = {
        "live": (me, 9 * day),
        "dead": (replace(me, started=me.started - 1), 0),
        "far": (elsewhere, day / 2),
        "far and silent": (elsewhere, 2 * day),
        "unknown": (None, day / 2),
        "unknown and silent": (None, 2 * day),
    }
    for name, (owner, age) in builders.items():
        folder = tmp_path / f".{name}.tmp"
        folder.mkdir()
        (folder / "a.npy").write_bytes(b"half")
        if owner is not None:
            (folder / OWNER).write_bytes(owner.serialise())
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - age,) * 2)
    check(ArrayCache(tmp_path).get("key", LAYOUT, rows))
    assert {path.name for path in tmp_path.iterdir()} == {".live.tmp", ".far.tmp", ".unknown.tmp", "key"}
    assert not (tmp_path / "key" / OWNER).exists()


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> Rows:
        yield next(rows())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ArrayCache(tmp_path).get("key", LAYOUT, fails)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_builds_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = ArrayCache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        check(cache.get("key", LAYOUT, rows))
        check(cache.get("key2", LAYOUT, rows))
    assert caplog.text.count("cannot be written") == 1 and "--data-cache-path" in caplog.text


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
