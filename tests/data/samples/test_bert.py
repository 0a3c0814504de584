from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lsh.config import BertConfig, parse_args
from megatron_lsh.config.bert import BertSettings
from megatron_lsh.data.blend import BlendedDataset
from megatron_lsh.data.loader import BatchIterator, Datasets
from megatron_lsh.data.samples.bert import BertRecipe
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.samples.packing import Passage
from megatron_lsh.data.tokenizers import (
    GPTSentencePieceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_lsh.data.tokenizers.wordpiece import BertWordPieceTokenizer
from megatron_lsh.data.vocabulary import write_description
from megatron_lsh.errors import ConfigError, DataError
from tests.data.helpers import bert_datasets, numbered, numbered_sentences, same, write_dataset, write_sentences

TOKENIZER = NullTokenizer(20_000)
CLS, SEP, MASK, PAD = TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.mask, TOKENIZER.pad


def recipe(seq_length: int = 64, tokenizer: Tokenizer = TOKENIZER, **settings: object) -> BertRecipe:
    return BertRecipe.of(BertSettings(**settings), seq_length, tokenizer)  # type: ignore[arg-type]


def passage(length: int, sentences: int = 1, documents: tuple[int, ...] = ()) -> Passage:
    begins = np.arange(sentences) * (length // sentences)
    return Passage(np.arange(1000, 1000 + length), begins, np.array(documents, dtype=np.int64))


def restored(sample: Sample) -> np.ndarray:
    """The tokens before masking."""
    predicted = sample["loss_mask"] == 1
    assert (sample["labels"][~predicted] == 0).all()
    return np.where(predicted, sample["labels"], sample["tokens"])


def text_of(sample: Sample) -> np.ndarray:
    """bool [S]: tokens of the text, without the special ones and padding."""
    return sample["padding_mask"] & ~np.isin(restored(sample), [CLS, SEP])


def test_sample_with_two_segments() -> None:
    swaps, cuts = [], set()
    for number in range(600):
        sample = recipe().sample(passage(40, sentences=4), np.random.RandomState(number))
        tokens = restored(sample)
        first, second = np.flatnonzero(tokens == SEP)
        assert tokens[0] == CLS and second == 42 and (tokens[43:] == PAD).all()
        assert sample["padding_mask"].tolist() == [True] * 43 + [False] * 21
        assert sample["token_types"].tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * 21
        a, b = tokens[1:first], tokens[first + 1 : second]
        swapped = int(sample["is_random"])
        assert np.concatenate([b, a] if swapped else [a, b]).tolist() == [*range(1000, 1040)]
        swaps.append(swapped)
        cuts.add(len(b if swapped else a))
        assert not sample["loss_mask"][~text_of(sample)].any() and sample["loss_mask"].sum() == 6
    assert cuts == {10, 20, 30}  # at the sentences
    assert np.mean(swaps) == pytest.approx(0.5, abs=0.06)
    assert {name: (value.dtype, value.shape) for name, value in sample.items()} == {
        "tokens": (np.int64, (64,)),
        "token_types": (np.int64, (64,)),
        "labels": (np.int64, (64,)),
        "loss_mask": (np.float32, (64,)),
        "padding_mask": (np.bool_, (64,)),
        "is_random": (np.int64, ()),
    }


def test_single_sentence_is_cut_inside() -> None:
    for number in range(50):
        sample = recipe().sample(passage(2), np.random.RandomState(number))
        expected = [CLS, 1001, SEP, 1000, SEP] if sample["is_random"] else [CLS, 1000, SEP, 1001, SEP]
        assert restored(sample)[:5].tolist() == expected


def test_sample_without_binary_head() -> None:
    """One segment, a separator at each end of a document."""
    sample = recipe(bert_binary_head=False).sample(passage(20, 4, (5, 15)), np.random.RandomState(0))
    text = [*range(1000, 1020)]
    assert restored(sample)[:24].tolist() == [CLS, *text[:5], SEP, *text[5:15], SEP, *text[15:], SEP]
    assert sample["padding_mask"].sum() == 24 and not sample["token_types"].any() and "is_random" not in sample
    assert recipe(bert_binary_head=False).packing.across_documents and not recipe().packing.across_documents


def test_statistics_of_masks() -> None:
    """15% of the text; 80% masked, 10% random, 10% kept; n-grams of one, two and three words, 1/n as often."""
    big = recipe(512)
    samples = [big.sample(passage(509, 20), np.random.RandomState(number)) for number in range(800)]
    predicted = np.array([sample["loss_mask"] == 1 for sample in samples])
    assert (predicted.sum(axis=1) == round(0.15 * 509)).all()
    tokens, labels = (np.array([sample[name] for sample in samples])[predicted] for name in ("tokens", "labels"))
    assert (tokens == MASK).mean() == pytest.approx(0.8, abs=0.006)
    assert (tokens == labels).mean() == pytest.approx(0.1, abs=0.005)
    other = tokens[(tokens != MASK) & (tokens != labels)]
    assert len(other) / len(tokens) == pytest.approx(0.1, abs=0.005)
    special = {*range(20_001)} - {*TOKENIZER.text_ids().tolist()}
    assert not special & {*other.tolist()} and other.min() < 200 and other.max() > 19_800
    # Every position of the text is as likely as the others.
    share = predicted.mean(axis=0)[1:511].reshape(-1, 10).mean(axis=1)
    assert share.min() > 0.12 and share.max() < 0.18
    # Runs of single words: those of three and more are rarer than of two, those rarer than of one.
    edges = np.diff(np.pad(predicted, ((0, 0), (1, 1))).astype(int), axis=1)
    runs = np.concatenate([np.flatnonzero(row == -1) - np.flatnonzero(row == 1) for row in edges])
    assert 1 < runs.mean() < 2.5 and (runs == 1).sum() > (runs == 2).sum() > (runs == 3).sum() > 0


def test_statistics_of_ngrams() -> None:
    """One, two and three words in proportion to 1, 1/2 and 1/3: seen where they are so few that they hardly meet."""
    sparse = recipe(8003, mask_prob=0.015)
    runs: list[int] = []
    for number in range(80):
        mask = sparse.sample(passage(8000), np.random.RandomState(number))["loss_mask"]
        edges = np.diff(np.pad(mask, 1))
        runs += (np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)).tolist()
    share = np.bincount(runs)[1:4] / len(runs)
    assert share.tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.025)


def test_whole_words(vocab_file: Path) -> None:
    """All pieces of a word are predicted, or none."""
    tokenizer = BertWordPieceTokenizer(str(vocab_file), lower_case=False)
    ids = tokenizer.tokenize("something wordsmith importname othersome " * 12)
    text = Passage(np.array(ids), np.array([0, len(ids) // 2]), np.zeros(0, dtype=np.int64))
    inside = tokenizer.continues_word()
    split = recipe(512, tokenizer)
    share = []
    for number in range(200):
        sample = split.sample(text, np.random.RandomState(number))
        original, predicted = restored(sample), sample["loss_mask"] == 1
        goes_on = inside[original[1:]] & (original[:-1] != tokenizer.sep)
        assert (predicted[1:][goes_on] == predicted[:-1][goes_on]).all()
        share.append(predicted.sum() / len(ids))
    assert 0.11 < np.mean(share) <= 0.15 + 1 / len(ids)
    # A word longer than the budget is cut rather than nothing predicted.
    alone = Passage(np.array(tokenizer.tokenize("something")), np.array([0]), np.zeros(0, dtype=np.int64))
    assert len(alone.tokens) > 3
    assert all(split.sample(alone, np.random.RandomState(number))["loss_mask"].sum() == 1 for number in range(20))


def build(
    num_samples: tuple[int, int, int] = (60, 8, 0), tokenizer: Tokenizer = TOKENIZER, **settings: object
) -> Datasets:
    cfg = BertConfig()
    cfg.model.seq_length, cfg.training.seed = int(settings.pop("seq_length", 24)), int(settings.pop("seed", 1))  # type: ignore[call-overload]
    for name in ("bert_binary_head", "short_seq_prob"):
        setattr(cfg.bert, name, settings.pop(name, getattr(cfg.bert, name)))
    for name, value in settings.items():
        setattr(cfg.data, name, value)
    return bert_datasets(cfg, tokenizer, num_samples)


def train(**settings: object) -> list[Sample]:
    dataset = build(**settings).train  # type: ignore[arg-type]
    assert dataset is not None
    return [dataset[i] for i in range(len(dataset))]


def test_pure_function_of_seed_and_number(corpus: str) -> None:
    for head in (True, False):
        make = partial(train, data_path=[corpus], split="1", bert_binary_head=head)
        short, long, other = make(num_samples=(40, 0, 0)), make(num_samples=(400, 0, 0)), make(seed=2)
        assert all(map(same, short, long))
        assert not any(map(same, short, other))
        dataset = build(data_path=[corpus], split="1", bert_binary_head=head).train
        assert dataset is not None and same(dataset[33], short[33]) and same(dataset[33], short[33])  # in any order


def test_every_epoch_has_other_masks(corpus: str) -> None:
    dataset = build(
        data_path=[corpus], split="1", num_samples=(2, 0, 0), short_seq_prob=0.0, bert_binary_head=False
    ).train
    assert dataset is not None
    size = dataset.passages.samples_per_epoch  # type: ignore[attr-defined]
    samples = train(
        data_path=[corpus], split="1", num_samples=(2 * size, 0, 0), short_seq_prob=0.0, bert_binary_head=False
    )
    first, second = ({tuple(restored(s)): s["loss_mask"] for s in part} for part in (samples[:size], samples[size:]))
    assert first.keys() == second.keys() and len(first) == size
    assert np.mean([(first[text] == second[text]).all() for text in first]) < 0.1


@pytest.mark.parametrize("head", [True, False])
def test_an_epoch_reads_every_token_once(corpus: str, head: bool) -> None:
    settings = {"data_path": [corpus], "split": "1", "bert_binary_head": head}
    dataset = build(num_samples=(1, 0, 0), **settings).train  # type: ignore[arg-type]
    samples = train(num_samples=(dataset.passages.samples_per_epoch, 0, 0), **settings)  # type: ignore[union-attr]
    seen = np.concatenate([restored(sample)[text_of(sample)] for sample in samples])
    assert sorted(seen.tolist()) == [*range(4200)]


def test_splits_blend_and_batches(corpus: str, tmp_path: Path) -> None:
    datasets = build((300, 60, 60), data_path=[corpus], split="80,15,5")
    fingerprints = set()
    for dataset, low, high in zip(datasets, (0, 3360, 3990), (3360, 3990, 4200), strict=True):
        assert dataset is not None
        seen = np.concatenate([restored(dataset[i])[text_of(dataset[i])] for i in range(len(dataset))])
        assert seen.min() >= low and seen.max() < high
        fingerprints.add(dataset.fingerprint())
    assert len(fingerprints) == 3
    write_sentences(tmp_path / "other", [[[t + 5000 for t in s] for s in d] for d in numbered_sentences([[3, 8]] * 90)])
    blend = build((40, 0, 0), data_path=["1", corpus, "3", str(tmp_path / "other")], split="1").train
    assert isinstance(blend, BlendedDataset)
    assert sum(int(restored(blend[i])[1]) < 5000 for i in range(40)) == 10
    with BatchIterator(blend, consumed_samples=8, micro_batch_size=4, dp_rank=0, dp_size=1) as batches:
        batch = next(batches)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        **dict.fromkeys(("tokens", "token_types", "labels", "loss_mask", "padding_mask"), (4, 24)),
        "is_random": (4,),
    }
    assert batch["padding_mask"].dtype == torch.bool and batch["is_random"].dtype == torch.int64
    assert same({name: value[1].numpy() for name, value in batch.items()}, blend[9])


def test_mock_data() -> None:
    for head in (True, False):
        words = (
            "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --micro-batch-size 1 --seq-length 64 --mock-data"
        )
        cfg = parse_args([*words.split(), *([] if head else ["--bert-no-binary-head"])], config_class=BertConfig)
        tokenizer = build_tokenizer(cfg.data)
        first, second = (bert_datasets(cfg, tokenizer, (20, 5, 0)) for _ in range(2))
        assert first.train is not None and second.train is not None and first.valid is not None and first.test is None
        assert all(same(first.train[i], second.train[i]) for i in range(20))
        assert first.train.fingerprint() == second.train.fingerprint() != first.valid.fingerprint()
        assert not same(first.train[0], first.valid[0]) and ("is_random" in first.train[0]) == head
        with pytest.raises(IndexError):
            first.train[20]


def test_files_without_sentences(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "corpus_text_document", numbered([30] * 20))
    with pytest.raises(
        DataError, match=r"_document holds whole documents .20, each one .* BERT needs them .*--split-sentences"
    ):
        build(data_path=[source.prefix])
    # Unless it is said that they are sentences.
    write_description(source, TOKENIZER, None, split_sentences=True)
    assert build(data_path=[source.prefix], split="1").train is not None


def test_odd_documents(tmp_path: Path) -> None:
    """Empty ones, single sentences, sentences of one token, and one longer than a sample."""
    text = numbered_sentences([[], [1], [5], [0, 0], [100], [1, 1, 1], [0, 3]])
    source = write_sentences(tmp_path / "odd", text)
    for head, lost in ((True, [0]), (False, [])):  # a document of one token has no two segments
        samples = train(data_path=[source.prefix], split="1", num_samples=(200, 0, 0), bert_binary_head=head)
        seen = {int(t) for sample in samples for t in restored(sample)[text_of(sample)]}
        assert sorted({*range(112)} - seen) == lost
        assert all(sample["loss_mask"].sum() >= 1 for sample in samples)


def test_errors(corpus: str, vocab_file: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    without = tmp_path / "vocab.txt"
    without.write_text(vocab_file.read_text().replace("[MASK]", "[ELSE]"))
    for tokenizer, message in (
        (
            BertWordPieceTokenizer(str(without), False),
            r"no mask token, which BERT needs.*a line \[MASK\] in --vocab-file",
        ),
        (
            GPTSentencePieceTokenizer(str(sentencepiece_model)),
            "no cls token.*SentencePieceTokenizer, which adds its own",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            build(tokenizer=tokenizer, data_path=[corpus])
    assert recipe(tokenizer=SentencePieceTokenizer(str(sentencepiece_model))).mask == 323
    with pytest.raises(ConfigError, match=r"model.seq_length \(4\) must be at least 5"):
        build(seq_length=4, data_path=[corpus])
    with pytest.raises(ConfigError, match="no training data"):
        build()
    with pytest.raises(DataError, match=r"valid set: .* supplies 0 of its 100 documents with 0 tokens"):
        build(data_path=[corpus], split="999,1")


def test_builder_failure_reaches_the_barrier(tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole", numbered([30] * 20))
    cfg = BertConfig()
    cfg.model.seq_length, cfg.data.data_path = 24, [str(tmp_path / "whole")]
    for is_builder in (True, False):
        calls: list[str] = []
        with pytest.raises(DataError, match="--split-sentences"):
            bert_datasets(cfg, TOKENIZER, (1, 0, 0), is_builder, lambda: calls.append("barrier"))  # noqa: B023
        assert calls == ["barrier"]


def test_samples_are_pinned() -> None:
    """A resumed run must see the same masks under every version of numpy, so this may never change."""
    sample = recipe(20).sample(passage(15, 3), np.random.RandomState(1234))
    assert (sample["tokens"].tolist(), sample["labels"].nonzero()[0].tolist()) == PINNED


PINNED = (
    [
        19994,
        1010,
        1011,
        1012,
        1013,
        19996,
        19995,
        1000,
        1001,
        1002,
        1003,
        1004,
        1005,
        1006,
        1007,
        19996,
        1009,
        19995,
        19997,
        19997,
    ],
    [5, 15],
)
