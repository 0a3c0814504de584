"""The kinds of samples there are: next tokens for a GPT, and passages of sentences for BERT and T5."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_lsh.data.cache import ArrayCache
from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.samples.dataset import Corpus, Dataset, Sample
from megatron_lsh.data.samples.gpt import GPTDataset, SampleRules
from megatron_lsh.data.samples.mock import MockDataset, MockPassages
from megatron_lsh.data.samples.packing import PackedPassages, Packing, Passage
from megatron_lsh.data.vocabulary import read_description
from megatron_lsh.errors import DataError


@dataclass(frozen=True)
class GPTSamples:
    """Windows of ``seq_length`` tokens, each predicting the next."""

    seq_length: int
    seed: int
    rules: SampleRules

    def check(self, source: IndexedDataset) -> None:
        """Any file will do."""

    def shortage(self, corpus: Corpus) -> str | None:
        return corpus.less_than(self.seq_length + 1, f"--seq-length + 1 = {self.seq_length + 1}")

    def dataset(self, corpus: Corpus, num_samples: int, cache: ArrayCache) -> Dataset:
        source, documents = corpus
        return GPTDataset(source, documents, self.seq_length, num_samples, self.seed, self.rules, cache)

    def mock(self, stream: int, num_samples: int) -> Dataset:
        return MockDataset(stream, self.seq_length, num_samples, self.seed, self.rules)


class Recipe(Protocol):
    """How a passage becomes a sample: `BertRecipe` or `T5Recipe`."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def text_ids(self) -> np.ndarray: ...

    @property
    def packing(self) -> Packing: ...

    def facts(self) -> tuple[object, ...]: ...

    def sample(self, passage: Passage, state: np.random.RandomState) -> Sample: ...


class Passages(Protocol):
    """Texts of samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Passage: ...

    def fingerprint(self) -> str: ...


class PassageDataset:
    """Samples made of passages; each a pure function of (seed, index), with Megatron's seed (seed + index) mod 2^32."""

    def __init__(self, passages: Passages, recipe: Recipe, seed: int) -> None:
        self.passages, self.recipe, self.seed = passages, recipe, seed

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, index: int) -> Sample:
        # RandomState, because numpy freezes its streams for all versions to come; Generator's may change.
        return self.recipe.sample(self.passages[index], np.random.RandomState((self.seed + index) % 2**32))

    def fingerprint(self) -> str:
        facts = (self.passages.fingerprint(), self.recipe.facts(), self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass(frozen=True)
class PassageSamples:
    """Samples of BERT or T5, which need files split into sentences."""

    recipe: Recipe
    seed: int

    def check(self, source: IndexedDataset) -> None:
        """Refuses a file without sentences: of one sequence per document, and not known to be split.

        Raises:
            DataError: naming the file and what to do.
        """
        per_document = np.diff(source.document_index)
        if not len(per_document) or per_document.max() > 1:
            return
        if (read_description(source) or {}).get("split_sentences"):
            return  # every document is a single sentence (recorded as split)
        raise DataError(
            f"{source.prefix} holds whole documents ({source.num_documents}, each one sequence), but {self.recipe.name} "
            "needs them split into sentences: write the data again with tools/preprocess_data.py --split-sentences and give "
            "--data-path its PREFIX_text_sentence"
        )

    def shortage(self, corpus: Corpus) -> str | None:
        return corpus.less_than(self.recipe.packing.shortest, f"{self.recipe.packing.shortest} tokens at least")

    def dataset(self, corpus: Corpus, num_samples: int, cache: ArrayCache) -> Dataset:
        recipe = self.recipe
        passages = PackedPassages(corpus, recipe.packing, num_samples, self.seed, recipe.vocab_size, cache)
        return PassageDataset(passages, recipe, self.seed)

    def mock(self, stream: int, num_samples: int) -> Dataset:
        passages = MockPassages(stream, self.recipe.packing, num_samples, self.seed, self.recipe.text_ids)
        return PassageDataset(passages, self.recipe, self.seed)
