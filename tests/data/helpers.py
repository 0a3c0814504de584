"""Small datasets for the tests of this folder."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_lsh.config import BertConfig, DataConfig, T5Config
from megatron_lsh.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_lsh.data.loader import Datasets, build_datasets
from megatron_lsh.data.samples.bert import BertRecipe
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.samples.gpt import SampleRules
from megatron_lsh.data.samples.kinds import GPTSamples, PassageSamples
from megatron_lsh.data.samples.t5 import T5Recipe
from megatron_lsh.data.tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "u2") -> IndexedDataset:
    """A dataset of one sequence per document."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths in which every token is its own position in the file, so samples show their origin."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return [list(range(begin, end)) for begin, end in pairwise(bounds)]


def load_tool(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"megatron_lsh.commands.{name}")


def start_tool(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script of tools/ as a user would."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/ to its end. It imports everything: seconds."""
    process = start_tool(name, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported it."""
    out, err, words = io.StringIO(), io.StringIO(), [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = load_tool(name).main(words)
        except SystemExit as exit:
            status = exit.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def write_sentences(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "u2") -> IndexedDataset:
    """A dataset of one sequence per sentence."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([token for sentence in document for token in sentence], [len(s) for s in document])
    return IndexedDataset(prefix)


def numbered_sentences(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Documents of sentences of these lengths in which every token is its own position in the file."""
    flat = iter(numbered([length for document in lengths for length in document]))
    return [[next(flat) for _ in document] for document in lengths]


def same(one: Sample, other: Sample) -> bool:
    """Whether two samples hold the same arrays."""
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


Counts = tuple[int, int, int]


def gpt_datasets(
    data: DataConfig, seq_length: int, seed: int, counts: Counts, tokenizer: Tokenizer, *place: Any
) -> Datasets:
    """Datasets of a GPT; `place` is who builds them, and the barrier."""
    rules = SampleRules(
        tokenizer.eod, tokenizer.vocab_size, data.eod_mask_loss, data.reset_position_ids, data.reset_attention_mask
    )
    return build_datasets(data, seed, counts, tokenizer, GPTSamples(seq_length, seed, rules), *place)


def bert_datasets(cfg: BertConfig, tokenizer: Tokenizer, counts: Counts, *place: Any) -> Datasets:
    """The same of a BERT."""
    kind = PassageSamples(BertRecipe.of(cfg.bert, cfg.model.seq_length or 0, tokenizer), cfg.training.seed)
    return build_datasets(cfg.data, cfg.training.seed, counts, tokenizer, kind, *place)


def t5_datasets(cfg: T5Config, tokenizer: Tokenizer, counts: Counts) -> Datasets:
    """The same of a T5."""
    lengths = [length or cfg.model.seq_length or 0 for length in (cfg.t5.encoder_seq_length, cfg.t5.decoder_seq_length)]
    kind = PassageSamples(T5Recipe.of(cfg.t5, *lengths, tokenizer), cfg.training.seed)
    return build_datasets(cfg.data, cfg.training.seed, counts, tokenizer, kind)
