"""Synthetic tokens for --mock-data: no files, yet something to learn."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.samples.gpt import SampleRules, make_sample
from megatron_lsh.data.samples.packing import Packing, Passage

NOISE = 0.1  # share of tokens drawn at random
MEAN_DOCUMENT = 256  # tokens
MEAN_SENTENCE = 16


class MockDataset:
    """Documents that walk along one fixed random cycle of the vocabulary, with a tenth of the tokens replaced by noise.

    A model that has learned the successor of every token reaches a loss of about 0.1 ln(V) + 0.3.

    Args:
        stream: number of the split; each has samples of its own over the same cycle.
        seed: samples are a pure function of (seed, stream, index).
    """

    def __init__(self, stream: int, seq_length: int, num_samples: int, seed: int, rules: SampleRules) -> None:
        self.stream, self.seq_length, self.num_samples, self.seed, self.rules = (
            stream,
            seq_length,
            num_samples,
            seed,
            rules,
        )
        ids = np.delete(np.arange(rules.vocab_size), rules.eod)
        self._cycle = np.random.RandomState(seed % 2**32).permutation(ids)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, self.stream, index])))
        length, size = self.seq_length + 1, len(self._cycle)
        is_eod = state.random_sample(length) < 1 / MEAN_DOCUMENT
        document = np.concatenate([[0], np.cumsum(is_eod)[:-1]])
        begin = state.randint(size, size=length)[document]  # where on the cycle each document begins
        window = self._cycle[(begin + np.arange(length)) % size]
        window = np.where(state.random_sample(length) < NOISE, self._cycle[state.randint(size, size=length)], window)
        window[is_eod] = self.rules.eod
        return make_sample(window.astype(np.int64), self.rules)

    def fingerprint(self) -> str:
        facts = ("mock", self.stream, self.seq_length, self.seed, self.rules.vocab_size, self.rules.eod)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


class MockPassages:
    """Passages that walk along one fixed random cycle of the vocabulary, with a tenth of the tokens replaced by noise.

    Args:
        stream: number of the split; each has passages of its own over the same cycle.
        packing: their lengths.
        seed: passages are a pure function of (seed, stream, index).
        ids: int64, what a token may be.
    """

    def __init__(self, stream: int, packing: Packing, num_samples: int, seed: int, ids: np.ndarray) -> None:
        self.stream, self.packing, self.num_samples, self.seed = stream, packing, num_samples, seed
        self._cycle = np.random.RandomState(seed % 2**32).permutation(ids)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Passage:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, self.stream, index])))
        length, size = self.packing.length, len(self._cycle)
        if state.random_sample() < self.packing.short_share:
            length = state.randint(2, length + 1)
        tokens = self._cycle[(state.randint(size) + np.arange(length)) % size]
        tokens = np.where(state.random_sample(length) < NOISE, self._cycle[state.randint(size, size=length)], tokens)
        begins = state.random_sample(length) < 1 / MEAN_SENTENCE
        begins[0] = True
        return Passage(tokens.astype(np.int64), np.flatnonzero(begins), np.zeros(0, dtype=np.int64))

    def fingerprint(self) -> str:
        facts = ("mock", self.stream, self.packing, self.seed, self._cycle.tolist())
        return hashlib.sha256(repr(facts).encode()).hexdigest()
