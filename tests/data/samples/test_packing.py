from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.cache import ArrayCache
from megatron_lsh.data.indexed import IndexedDataset
from megatron_lsh.data.samples.dataset import Corpus
from megatron_lsh.data.samples.packing import PackedPassages, Packing, Passage
from megatron_lsh.errors import DataError
from tests.data.helpers import numbered_sentences, write_sentences


def pack(
    source: IndexedDataset, packing: Packing, num_samples: int = 0, seed: int = 1, **other: object
) -> PackedPassages:
    documents = other.pop("documents", (0, source.num_documents))
    corpus = Corpus(source, documents)  # type: ignore[arg-type]
    return PackedPassages(corpus, packing, num_samples, seed, 65535, ArrayCache(other.pop("cache", None)))  # type: ignore[arg-type]


def epoch_of(source: IndexedDataset, packing: Packing, epoch: int = 0, **other: object) -> list[Passage]:
    size = pack(source, packing, **other).samples_per_epoch  # type: ignore[arg-type]
    passages = pack(source, packing, size * (epoch + 1), **other)  # type: ignore[arg-type]
    return [passages[i] for i in range(size * epoch, size * (epoch + 1))]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=8),
    packing=st.builds(Packing, st.integers(6, 15), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 3), st.booleans()),
    data=st.data(),
)
def test_every_token_is_in_one_passage(lengths: list[list[int]], packing: Packing, data: st.DataObject) -> None:
    """Whole sentences in their order, long ones in pieces, within documents or across them; only short ends are lost."""
    start = data.draw(st.integers(0, len(lengths) - 1))
    text = numbered_sentences(lengths)
    used = [[sentence for sentence in document if sentence] for document in text[start:]]
    document_of = {token: i for i, document in enumerate(used) for sentence in document for token in sentence}
    sentence_of = {token: (i, j) for i, d in enumerate(used) for j, sentence in enumerate(d) for token in sentence}
    with tempfile.TemporaryDirectory() as folder:
        source = write_sentences(Path(folder) / "d", text)
        try:
            passages = epoch_of(source, packing, documents=(start, len(lengths)))
        except DataError as error:
            assert "have no text of" in str(error)
            passages = []
        again = epoch_of(source, packing, 1, documents=(start, len(lengths))) if passages else []
    seen = [token for passage in passages for token in passage.tokens.tolist()]
    assert len(set(seen)) == len(seen) and set(seen) <= set(document_of)
    # What is missing are ends of documents (or of everything) with fewer tokens than a passage needs.
    missing = sorted(set(document_of) - set(seen))
    for document in used:
        lost = [token for sentence in document for token in sentence if token in missing]
        assert lost == [token for sentence in document for token in sentence][-len(lost) :] or not lost
        assert len(lost) < packing.shortest
    assert not packing.across_documents or len(missing) < packing.shortest
    assert sorted(p.tokens.tolist() for p in passages) == sorted(p.tokens.tolist() for p in again)
    for passage in passages:
        tokens = passage.tokens.tolist()
        assert packing.shortest <= len(tokens) <= packing.length - packing.across_documents * len(passage.documents)
        jumps = [i + 1 for i, (a, b) in enumerate(pairwise(tokens)) if document_of[a] != document_of[b]]
        assert passage.documents.tolist() == jumps and (packing.across_documents or not jumps)
        assert all(b == a + 1 for i, (a, b) in enumerate(pairwise(tokens)) if i + 1 not in jumps)
        begins = passage.sentences.tolist()
        assert begins[0] == 0 and set(jumps) <= set(begins)
        for begin, end in pairwise([*begins, len(tokens)]):
            (sentence,) = {sentence_of[token] for token in tokens[begin:end]}
            whole = used[sentence[0]][sentence[1]]
            assert tokens[begin:end] == whole or len(whole) > packing.longest_piece


def test_as_many_sentences_as_fit(tmp_path: Path) -> None:
    source = write_sentences(tmp_path / "d", numbered_sentences([[3, 3, 3, 3], [4, 1], [9], []]))
    passages = sorted(passage.tokens.tolist() for passage in epoch_of(source, Packing(7)))
    pieces = [[*range(0, 6)], [*range(6, 12)], [*range(12, 17)], [*range(17, 21)], [*range(21, 26)]]
    assert passages == pieces  # the sentence of nine tokens is cut in equal pieces
    # Across documents a separator takes the place of a token.
    ends = epoch_of(source, Packing(100, across_documents=True))
    assert len(ends) == 1 and len(ends[0].documents) == 2 and len(ends[0].tokens) == 26


def test_short_passages(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    source = write_sentences(tmp_path / "d", numbered_sentences([[1] * n for n in rng.randint(500, 1500, size=40)]))
    size = [len(passage.tokens) for passage in epoch_of(source, Packing(50, 0.3))]
    short = [n for n in size if n < 50]
    # 30% aim at 2..50 tokens, which gives 48/49 of them fewer than 50; ends of documents add 40.
    assert (len(short) - 40) / len(size) == pytest.approx(0.3, abs=0.06)
    assert np.mean(short) == pytest.approx(25.5, abs=2)


def test_order_is_a_function_of_seed_and_number_alone(tmp_path: Path) -> None:
    source = write_sentences(tmp_path / "d", numbered_sentences([[4, 3, 5, 2]] * 10))
    for packing in (Packing(8, 0.2), Packing(8, 0.2, across_documents=True)):
        short, long, other = pack(source, packing, 7), pack(source, packing, 200), pack(source, packing, 200, seed=2)
        tokens = [[passages[i].tokens.tolist() for i in range(7)] for passages in (short, long, other)]
        assert tokens[0] == tokens[1] != tokens[2]
        assert short.fingerprint() == long.fingerprint() != other.fingerprint()
        first, second = (epoch_of(source, packing, epoch) for epoch in (0, 1))
        assert [p.tokens.tolist() for p in first] != [p.tokens.tolist() for p in second]
        for index in (-1, 7):
            with pytest.raises(IndexError):
                short[index]


def test_order_is_pinned(tmp_path: Path) -> None:
    """A resumed run must read the same passages under every version of numpy, so this may never change."""
    source = write_sentences(tmp_path / "d", numbered_sentences([[4, 3, 5, 2], [6, 6], [1, 9, 2]]))
    for across, expected in ((False, PINNED), (True, PINNED_ACROSS)):
        passages = pack(source, Packing(15 if across else 8, 0.5, 2, across), 8, seed=1234)
        assert [passages[i].tokens[[0, -1]].tolist() for i in range(8)] == expected


PINNED = [[7, 13], [31, 37], [26, 30], [0, 6], [20, 25], [14, 19], [26, 30], [31, 37]]
PINNED_ACROSS = [[0, 13], [27, 35], [14, 19], [36, 37], [20, 26], [20, 26], [0, 13], [36, 37]]


def test_cached_and_in_memory_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sentences(tmp_path / "d", numbered_sentences([[4, 3, 5, 2]] * 10))
    memory, built = (pack(source, Packing(8, 0.2), 60, cache=cache) for cache in (None, tmp_path / "c"))
    monkeypatch.setattr("megatron_lsh.data.samples.packing._cut", None)  # whoever finds the entries packs nothing
    mapped = pack(source, Packing(8, 0.2), 60, cache=tmp_path / "c")
    for i in range(60):
        assert memory[i].tokens.tolist() == built[i].tokens.tolist() == mapped[i].tokens.tolist()
        assert memory[i].sentences.tolist() == mapped[i].sentences.tolist()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="documents 0 to 3 have no text of 2 tokens"):
        pack(write_sentences(tmp_path / "d", [[[1]], [[2]], [[], [3]]]), Packing(8), 1)
    with pytest.raises(DataError, match=r"e\.bin holds token id 65535, but the vocabulary has 65535 ids"):
        pack(write_sentences(tmp_path / "e", [[[1, 65535], [2]]]), Packing(8), 1)[0]
