"""Names, order of preference, retention, and what a crash between any two steps leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.folders import Tracker
from megatron_lsh.checkpoint.manifest import MANIFEST


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / MANIFEST).write_text(name)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_megatron_names(tmp_path: Path) -> None:
    assert folders.iteration_folder(tmp_path, 100).name == "iter_0000100"
    assert folders.iteration_folder(tmp_path, 12345678).name == "iter_12345678"
    assert folders.TRACKER == "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"100", Tracker(100)), (b" 42\n", Tracker(42)), (b"release", Tracker(release=True))],
)
def test_tracker(tmp_path: Path, text: bytes, expected: Tracker) -> None:
    assert folders.read_tracker(tmp_path) is None
    (tmp_path / folders.TRACKER).write_bytes(text)
    assert folders.read_tracker(tmp_path) == expected


@pytest.mark.parametrize("text", [b"", b"1p0", b"-3", b"\xff\xff", b"1.5"])
def test_damaged_tracker_is_a_problem_not_an_exception(tmp_path: Path, text: bytes) -> None:
    (tmp_path / folders.TRACKER).write_bytes(text)
    tracker = folders.read_tracker(tmp_path)
    assert tracker is not None and tracker.problem is not None and folders.TRACKER in tracker.problem


def test_order_of_candidates(tmp_path: Path) -> None:
    touch(tmp_path, "iter_0000010", "iter_0000020", "iter_0000020.old", "iter_0000030", "iter_0000040.incomplete", "x")

    def order(tracker: Tracker | None) -> list[str]:
        return [path.name for _, path in folders.candidates(tmp_path, tracker)]

    newest_first = ["iter_0000030", "iter_0000020", "iter_0000020.old", "iter_0000010"]
    assert order(None) == newest_first
    assert order(Tracker(30)) == newest_first
    assert order(Tracker(problem="damaged")) == newest_first
    assert order(Tracker(999)) == newest_first
    assert order(Tracker(20)) == ["iter_0000020", "iter_0000020.old", "iter_0000010", "iter_0000030"]
    assert order(Tracker(2)) == newest_first
    assert order(Tracker(release=True)) == ["release", *newest_first]


def test_listing_a_folder_that_is_not_there_or_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "absent", tmp_path / "file"):
        assert folders.list_folders(root) == []
        assert folders.list_leftovers(root) == []
        assert folders.read_tracker(root) is None


def test_life_of_a_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "save"
    touch(root, "iter_0000005.incomplete")  # of a crashed save
    assert folders.remove_leftovers(root) == []
    folder = folders.start_folder(root, 10)
    assert names(root) == ["iter_0000010.incomplete"]
    (folder / MANIFEST).write_text("first")
    assert folders.commit(root, 10) == root / "iter_0000010"
    assert names(root) == ["iter_0000010", folders.TRACKER]
    assert folders.read_tracker(root) == Tracker(10)

    folder = folders.start_folder(root, 10)  # the same iteration again: the first one lives until the second is tracked
    (folder / MANIFEST).write_text("second")
    assert (root / "iter_0000010" / MANIFEST).read_text() == "first"
    folders.commit(root, 10)
    assert (root / "iter_0000010" / MANIFEST).read_text() == "second"
    assert (root / "iter_0000010.old" / MANIFEST).read_text() == "first"
    assert folders.tidy(root, 10, None) == ([root / "iter_0000010.old"], [])
    assert names(root) == ["iter_0000010", folders.TRACKER]


def test_a_commit_that_fails_leaves_things_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "iter_0000010", "iter_0000010.incomplete")
    (tmp_path / folders.TRACKER).write_text("10")

    def fail(path: Path, text: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_atomically", fail)
    with pytest.raises(OSError, match="No space"):
        folders.commit(tmp_path, 10)
    assert names(tmp_path) == ["iter_0000010", folders.TRACKER]
    assert (tmp_path / "iter_0000010" / MANIFEST).read_text() == "iter_0000010"


def test_a_crash_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "iter_0000010.old", "iter_0000010.incomplete")
    assert [path.name for _, path in folders.candidates(tmp_path, Tracker(10))] == ["iter_0000010.old"]
    folders.remove_leftovers(tmp_path)
    folders.start_folder(tmp_path, 20)
    assert names(tmp_path) == ["iter_0000010.old", "iter_0000020.incomplete"]


def test_retention_keeps_the_newest_and_every_multiple(tmp_path: Path) -> None:
    touch(tmp_path, *(f"iter_{i:07d}" for i in (10, 20, 30, 40, 50, 60)))
    removed, problems = folders.tidy(tmp_path, 50, 20)
    assert problems == []
    assert sorted(path.name for path in removed) == ["iter_0000010", "iter_0000030"]
    # 60 belongs to a run that was rolled back; it is not older than the checkpoint just written
    assert names(tmp_path) == ["iter_0000020", "iter_0000040", "iter_0000050", "iter_0000060"]


def test_removal_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "iter_0000010")
    (tmp_path / "iter_0000010" / "data").write_text("x")

    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        folders.remove_checkpoint(tmp_path / "iter_0000010")
    assert names(tmp_path / "iter_0000010") == ["data"]


def link(root: Path, name: str, target: Path) -> Path:
    (root / name).symlink_to(target)
    return root / name


@pytest.mark.parametrize("kind", ["iter_0000010", "iter_0000010.old", "iter_0000030.incomplete"])
def test_links_are_unlinked_and_never_followed(tmp_path: Path, kind: str) -> None:
    """Retention, replacing and tidying up, with another run's checkpoint linked into the save folder."""
    other, root = tmp_path / "other", tmp_path / "save"
    touch(other, "precious")
    touch(root, "iter_0000010", "iter_0000020.incomplete")
    if kind == "iter_0000010":
        folders.remove_checkpoint(root / kind)
    link(root, kind, other / "precious")
    folders.remove_leftovers(root)
    (folders.start_folder(root, 20) / MANIFEST).write_text("new")
    folders.commit(root, 20)
    folders.tidy(root, 20, 1000)
    assert names(root) == ["iter_0000020", folders.TRACKER]
    assert (other / "precious" / MANIFEST).read_text() == "precious"


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "file"])
@pytest.mark.parametrize("suffix", ["", ".old", ".incomplete"])
def test_saving_where_something_else_has_the_name(tmp_path: Path, kind: str, suffix: str) -> None:
    other, root = tmp_path / "other", tmp_path / "save"
    touch(other, "precious")
    root.mkdir()
    path = root / f"iter_0000010{suffix}"
    if kind == "folder":
        touch(root, path.name)
    elif kind == "file":
        path.write_text("x")
    else:
        link(root, path.name, other / ("precious" if kind == "link" else "nothing"))
    for _ in range(2):
        (folders.start_folder(root, 10) / MANIFEST).write_text("new")
        folders.commit(root, 10)
        folders.tidy(root, 10, None)
    assert (root / "iter_0000010" / MANIFEST).read_text() == "new"
    assert [name for name in names(root) if name.endswith("incomplete")] == []
    assert (other / "precious" / MANIFEST).read_text() == "precious"


def test_the_tracker_and_its_temporary_file_may_be_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "save").mkdir()
    for name in (folders.TRACKER, folders.TRACKER + ".tmp"):
        link(tmp_path / "save", name, victim)
    folders.write_tracker(tmp_path / "save", 7)
    assert victim.read_text() == "precious" and folders.read_tracker(tmp_path / "save") == Tracker(7)
    assert names(tmp_path / "save") == [folders.TRACKER]


def test_one_folder_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *(f"iter_{i:07d}" for i in (10, 20, 30, 40)))
    remove = folders.shutil.rmtree

    def fail_once(path: Path) -> None:
        if path.name == "iter_0000020":
            raise OSError(13, "Permission denied")
        remove(path)

    monkeypatch.setattr(folders.shutil, "rmtree", fail_once)
    removed, problems = folders.tidy(tmp_path, 40, 1000)
    assert sorted(path.name for path in removed) == ["iter_0000010", "iter_0000030"]
    assert problems == [f"{tmp_path / 'iter_0000020'}: Permission denied"]


def test_leftovers_of_every_kind_are_removed(tmp_path: Path) -> None:
    touch(tmp_path, "iter_0000010", "iter_0000020.incomplete", "mine.incomplete")
    for name in ("iter_0000030.incomplete", ".write_test_17", folders.TRACKER + ".tmp", "notes.tmp"):
        (tmp_path / name).write_text("x")
    assert folders.remove_leftovers(tmp_path) == []
    assert names(tmp_path) == ["iter_0000010", "mine.incomplete", "notes.tmp"]
