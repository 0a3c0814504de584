from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lsh.data.indexed import HEADER, IndexedDataset, IndexedDatasetWriter, merge, token_dtype
from megatron_lsh.errors import DataError
from tests.data.helpers import write_dataset

# Two documents, the first of two sequences: [1, 2, 3] [4] and [65499, 0], as uint16. Written out by hand.
GOLDEN_BIN = struct.pack("<6H", 1, 2, 3, 4, 65499, 0)
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)  # version
    + struct.pack("<B", 8)  # uint16
    + struct.pack("<Q", 3)  # sequences
    + struct.pack("<Q", 3)  # documents + 1
    + struct.pack("<3i", 3, 1, 2)  # lengths
    + struct.pack("<3q", 0, 6, 8)  # byte offsets
    + struct.pack("<3q", 0, 2, 3)  # document index
)
GOLDEN_MODES = struct.pack("<3b", 0, 1, 0)


def write_golden(prefix: Path, idx: bytes = GOLDEN_IDX, tokens: bytes = GOLDEN_BIN) -> None:
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(tokens)


@pytest.mark.parametrize("multimodal", [False, True])
def test_reads_golden_file(tmp_path: Path, multimodal: bool) -> None:
    write_golden(tmp_path / "d", GOLDEN_IDX + (GOLDEN_MODES if multimodal else b""))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.dtype == np.uint16
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (3, 2, 6)
    assert [dataset[i].tolist() for i in range(3)] == [[1, 2, 3], [4], [65499, 0]]
    assert dataset[-1].tolist() == [65499, 0]
    assert dataset.document_bounds(0, 2).tolist() == [0, 4, 6]
    assert dataset.document_bounds(1, 1).tolist() == [4]
    assert [dataset.document_start(i) for i in range(3)] == [0, 4, 6]
    assert (dataset.modes is None) != multimodal
    if dataset.modes is not None:
        assert dataset.modes.tolist() == [0, 1, 0]
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize("multimodal", [False, True])
def test_writes_golden_file(tmp_path: Path, multimodal: bool) -> None:
    with IndexedDatasetWriter(tmp_path / "new folder" / "d", np.uint16, multimodal) as writer:
        writer.add_document([1, 2, 3, 4], [3, 1], [0, 1] if multimodal else None)
        writer.add_document([65499, 0])
    assert (tmp_path / "new folder" / "d.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "new folder" / "d.idx").read_bytes() == GOLDEN_IDX + (GOLDEN_MODES if multimodal else b"")
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == ["d.bin", "d.idx"]


def test_int32_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[70000, 5]], "i4")
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<2i", 70000, 5)
    assert (tmp_path / "d.idx").read_bytes()[17] == 4
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [70000, 5]


def test_type_by_vocabulary() -> None:
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype("<u2"), np.dtype("<i4"))


documents_ = st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=3), max_size=6)


@given(documents=documents_, dtype=st.sampled_from(["u2", "i4", "i8"]))
def test_round_trip(documents: list[list[list[int]]], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "d"
        with IndexedDatasetWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add_document([t for sequence in document for t in sequence], [len(s) for s in document])
        dataset = IndexedDataset(prefix)
        read = [[dataset[s].tolist() for s in range(*dataset.document_index[d : d + 2])] for d in range(len(documents))]
        assert read == documents
        starts = [dataset.document_start(d) for d in range(len(documents) + 1)]
        assert starts == dataset.document_bounds(0, len(documents)).tolist()
        assert np.diff(starts).tolist() == [sum(len(s) for s in document) for document in documents]


def test_every_truncation_is_found(tmp_path: Path) -> None:
    for size in range(len(GOLDEN_IDX)):
        write_golden(tmp_path / "d", GOLDEN_IDX[:size])
        with pytest.raises(DataError, match=rf"d\.idx has {size} bytes"):
            IndexedDataset(tmp_path / "d")
    for size in range(len(GOLDEN_BIN)):
        write_golden(tmp_path / "d", GOLDEN_IDX, GOLDEN_BIN[:size])
        with pytest.raises(DataError, match=rf"d\.bin has {size} bytes, but its index describes 12 .*cut off"):
            IndexedDataset(tmp_path / "d")
    write_golden(tmp_path / "d", GOLDEN_IDX, GOLDEN_BIN + b"\0\0")
    with pytest.raises(DataError, match=r"has 14 bytes.*belongs to another index"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"XXXX", "not a Megatron .idx"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x09", "token type code 9"),
        (17, b"\x07", "token type code 7"),  # float32
        (18, struct.pack("<Q", 1 << 60), "cut off or damaged"),
        (26, struct.pack("<Q", 0), "cut off or damaged"),
        (HEADER.size, struct.pack("<i", -3), "sequence 0 has length -3"),
        (HEADER.size + 4, struct.pack("<i", 2), "sequence 2 has length 2 and byte offset 8"),
        (HEADER.size + 20, struct.pack("<q", 7), "sequence 1 has length 1 and byte offset 7"),
        (HEADER.size + 36, struct.pack("<q", 1), "document index from 1 to 3"),
        (HEADER.size + 44, struct.pack("<q", 4), "document index from 0 to 3; it must rise"),
        (HEADER.size + 52, struct.pack("<q", 2), "document index from 0 to 2"),
    ],
)
def test_damage_is_found(tmp_path: Path, offset: int, new: bytes, message: str) -> None:
    write_golden(tmp_path / "d", GOLDEN_IDX[:offset] + new + GOLDEN_IDX[offset + len(new) :])
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(tmp_path / "d")
    assert "d.idx" in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    write_golden(tmp_path / "corpus_text_document")
    with pytest.raises(DataError, match=r"corpus\.idx does not exist.*did you mean .*corpus_text_document\?"):
        IndexedDataset(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"leave out the suffix \.bin"):
        IndexedDataset(tmp_path / "corpus_text_document.bin")
    with pytest.raises(DataError, match=r"nothing/d\.idx does not exist.*preprocess_data.py"):
        IndexedDataset(tmp_path / "nothing" / "d")
    (tmp_path / "corpus_text_document.bin").unlink()
    with pytest.raises(DataError, match=r"corpus_text_document\.bin does not exist"):
        IndexedDataset(tmp_path / "corpus_text_document")


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "d", "u2") as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    write_golden(tmp_path / "d")
    with (
        pytest.raises(DataError, match="token id 65536 does not fit"),
        IndexedDatasetWriter(tmp_path / "d", "u2") as writer,
    ):
        writer.add_document([65536])
    assert (tmp_path / "d.bin").read_bytes() == GOLDEN_BIN  # an older file is not touched
    assert (tmp_path / "d.idx").read_bytes() == GOLDEN_IDX


def test_writer_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        IndexedDatasetWriter(tmp_path / "file" / "d", "u2")
    with pytest.raises(DataError, match="cannot be stored as float32"):
        IndexedDatasetWriter(tmp_path / "d", "f4")
    with IndexedDatasetWriter(tmp_path / "d", "u2") as writer:
        with pytest.raises(DataError, match="token id -1"):
            writer.add_document([-1])
        with pytest.raises(ValueError, match="add up"):
            writer.add_document([1, 2], [1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "d", "u2")
    writer._bin.close()
    writer._bin = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(DataError, match=r"No space left.*MB free there"):
        for _ in range(10):
            writer.add_document(np.zeros(10_000, dtype=np.int64))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_merge(tmp_path: Path) -> None:
    write_golden(tmp_path / "a")
    write_dataset(tmp_path / "b", [[7], [8, 9]])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with IndexedDatasetWriter(tmp_path / "expected", "u2") as writer:
        writer.add_document([1, 2, 3, 4], [3, 1])
        for document in ([65499, 0], [7], [8, 9]):
            writer.add_document(document)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/c{suffix}").read_bytes() == Path(f"{tmp_path}/expected{suffix}").read_bytes()
    write_dataset(tmp_path / "wide", [[70000]], "i4")
    with pytest.raises(DataError, match="wide stores int32 and cannot be merged"):
        merge([tmp_path / "a", tmp_path / "wide"], tmp_path / "bad")
    with pytest.raises(DataError, match="no datasets to merge"):
        merge([], tmp_path / "bad")
    assert not list(tmp_path.glob("bad*"))


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    write_golden(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tmp_path}/a{suffix}", f"{tmp_path}/elsewhere/b{suffix}")
    fingerprint = IndexedDataset(tmp_path / "a").fingerprint
    assert IndexedDataset(tmp_path / "elsewhere" / "b").fingerprint == fingerprint
    write_golden(tmp_path / "a", GOLDEN_IDX, b"\x07" + GOLDEN_BIN[1:])
    assert IndexedDataset(tmp_path / "a").fingerprint != fingerprint
