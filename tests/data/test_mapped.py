"""Files that get shorter while they are mapped: their pages end a process by a signal, unless it looks first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lsh.data.cache import ArrayCache
from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.samples.dataset import Corpus
from megatron_lsh.data.samples.gpt import GPTDataset, SampleRules
from megatron_lsh.data.samples.packing import PackedPassages, Packing
from megatron_lsh.errors import DataError
from tests.data.helpers import numbered_sentences, write_dataset, write_sentences

DOCUMENTS, TOKENS = 40, 700


def gpt(prefix: Path, cache: Path) -> GPTDataset:
    rules = SampleRules(eod=0, vocab_size=65535)
    return GPTDataset(IndexedDataset(prefix), (0, DOCUMENTS), 100, 1000, 1, rules, ArrayCache(cache))


def passages(prefix: Path, cache: Path) -> PackedPassages:
    corpus = Corpus(IndexedDataset(prefix), (0, DOCUMENTS))
    return PackedPassages(corpus, Packing(100, 0.1, 2, False), 1000, 1, 65535, ArrayCache(cache))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_sentences(tmp_path / "c", numbered_sentences([[TOKENS // 10] * 10] * DOCUMENTS))
    return tmp_path / "c"


@pytest.mark.parametrize("make", [gpt, passages])
@pytest.mark.parametrize(("suffix", "size"), [("bin", 0), ("bin", 4096), ("bin", -1), ("idx", 0), ("idx", 50)])
def test_a_data_file_that_was_cut_off_is_named(
    make: type, suffix: str, size: int, prefix: Path, tmp_path: Path
) -> None:
    dataset = make(prefix, tmp_path / "cache")
    dataset[0]
    file = Path(f"{prefix}.{suffix}")
    before = file.stat().st_size
    os.truncate(file, size if size >= 0 else before + size)
    for index in range(0, 1000, 37):
        with pytest.raises(
            DataError, match=rf"{file} has \d+ bytes, and had {before} when it was opened: it was cut off"
        ):
            dataset[index]


@pytest.mark.parametrize("make", [gpt, passages])
def test_a_file_that_was_replaced_or_removed_is_still_read(make: type, prefix: Path, tmp_path: Path) -> None:
    dataset, others = make(prefix, tmp_path / "cache"), make(prefix, tmp_path / "other")
    Path(f"{prefix}.bin").unlink()
    write_dataset(tmp_path / "new", [[1, 2, 3]])
    os.replace(tmp_path / "new.idx", f"{prefix}.idx")
    for index in range(0, 1000, 37):
        one, two = dataset[index], others[index]
        assert all(np.array_equal(a, b) for a, b in zip(_arrays(one), _arrays(two), strict=True))


@pytest.mark.parametrize("make", [gpt, passages])
@pytest.mark.parametrize("size", [0, 1000])
def test_a_cache_that_was_cut_off_is_built_again(make: type, size: int, prefix: Path, tmp_path: Path) -> None:
    dataset, other = make(prefix, tmp_path / "cache"), make(prefix, tmp_path / "other")
    dataset[0]
    for file in (tmp_path / "cache").rglob("*.npy"):
        os.truncate(file, min(size, file.stat().st_size - 1))
    for index in range(0, 1000, 37):
        one, two = dataset[index], other[index]
        assert all(np.array_equal(a, b) for a, b in zip(_arrays(one), _arrays(two), strict=True))


def _arrays(sample: object) -> list[np.ndarray]:
    return list(sample.values() if isinstance(sample, dict) else sample)  # type: ignore[call-overload]


RUN = """
import os, sys
from megatron_lsh.commands.pretrain_gpt_moe import main
from megatron_lsh.data import loader
collate, calls = loader.collate, []
def cut(dataset, indices):
    calls.append(indices)
    if len(calls) == 6 and os.environ["RANK"] == "1":
        os.truncate(sys.argv[sys.argv.index("--data-path") + 1] + ".bin", 0)
    return collate(dataset, indices)
loader.collate = cut
sys.exit(main())
"""
FLAGS = """
--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --max-position-embeddings 8 --micro-batch-size 1
--global-batch-size 2 --train-iters 400 --lr 1e-3 --eval-iters 0 --tokenizer-type NullTokenizer --vocab-size 65000
--split 1,0,0 --distributed-timeout-minutes 1 --device cpu --num-workers 2
"""


@pytest.mark.slow
def test_every_rank_of_a_run_ends_with_the_name_of_the_file(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--redirects", "3", "--log-dir", str(tmp_path / "log"), str(tmp_path / "run.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *FLAGS.split(), "--data-path", str(prefix)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    logs = [file.read_text() for file in (tmp_path / "log").rglob("stderr.log")]
    assert done.returncode != 0 and len(logs) == 2
    for log in logs:
        assert f"{prefix}.bin has 0 bytes, and had" in log, log[-2000:]
