"""The manifest detects every change, also of itself; files change as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    ManifestError,
    check_file,
    hash_file,
    read_manifest,
    share,
    write_atomically,
    write_manifest,
)


def make(folder: Path, contents: dict[str, bytes]) -> Manifest:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        iteration=7,
        files=tuple(hash_file(folder / name) for name in sorted(contents)),
        layout={"world_size": 1, "tp": 1},
        config_sha256="c",
        torch_version="2",
        package_version="0",
        created="2026-01-01T00:00:00+00:00",
        has_optimizer=True,
        has_rng=False,
    )
    write_manifest(folder, manifest)
    return manifest


def test_round_trip(tmp_path: Path) -> None:
    manifest = make(tmp_path, {"a": b"hello", "b": b""})
    assert read_manifest(tmp_path) == manifest
    assert manifest.total_bytes == 5
    assert all(check_file(tmp_path, entry) is None for entry in manifest.files)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", MANIFEST]


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    make(tmp_path, {"a": b"hello"})
    path = tmp_path / MANIFEST
    original = path.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ManifestError, match="damaged"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b'{"files": 3}', b"\xff\xfe"])
def test_other_text_is_not_a_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(ManifestError, match="damaged"):
        read_manifest(tmp_path)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="missing"):
        read_manifest(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    manifest = make(tmp_path, {"a": b"x"})
    write_manifest(tmp_path, Manifest(**{**vars(manifest), "format": 99, "sha256": ""}))
    with pytest.raises(ManifestError, match="format 99"):
        read_manifest(tmp_path)


def test_changed_files_are_named(tmp_path: Path) -> None:
    [entry] = make(tmp_path, {"a": b"hello"}).files
    (tmp_path / "a").write_bytes(b"hellp")
    assert check_file(tmp_path, entry, hashes=False) is None
    assert "a is damaged" in str(check_file(tmp_path, entry))
    (tmp_path / "a").write_bytes(b"hell")
    assert "a has 4 bytes instead of 5" in str(check_file(tmp_path, entry))
    (tmp_path / "a").unlink()
    assert "a cannot be read" in str(check_file(tmp_path, entry))


@given(sizes=st.lists(st.integers(0, 10**9), max_size=30), ranks=st.integers(1, 8))
def test_hashing_is_shared_completely_and_evenly(sizes: list[int], ranks: int) -> None:
    files = [FileEntry(f"f{i}", size, "") for i, size in enumerate(sizes)]
    shares = [share(files, rank, ranks) for rank in range(ranks)]
    assert sorted((e for s in shares for e in s), key=files.index) == files
    loads = [sum(entry.size + 4096 for entry in s) for s in shares]
    assert max(loads) - min(loads) <= max((size + 4096 for size in sizes), default=0)


def test_atomic_write_leaves_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tracker"
    write_atomically(path, b"1")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"2")
    assert path.read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["tracker"]
