from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_lsh.config import T5Config, parse_args
from megatron_lsh.config.t5 import T5Settings
from megatron_lsh.data.blend import BlendedDataset
from megatron_lsh.data.loader import Datasets
from megatron_lsh.data.samples.dataset import Sample
from megatron_lsh.data.samples.packing import Passage
from megatron_lsh.data.samples.t5 import T5Recipe, _divide
from megatron_lsh.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_lsh.errors import ConfigError, DataError
from tests.data.helpers import numbered, numbered_sentences, same, t5_datasets, write_dataset, write_sentences

TOKENIZER = NullTokenizer(20_000, 100)
SENTINELS = [*TOKENIZER.sentinels]


def recipe(encoder: int = 512, decoder: int = 128, tokenizer: Tokenizer = TOKENIZER, **settings: object) -> T5Recipe:
    return T5Recipe.of(T5Settings(**settings), encoder, decoder, tokenizer)  # type: ignore[arg-type]


def passage(length: int) -> Passage:
    return Passage(np.arange(1000, 1000 + length), np.array([0]), np.zeros(0, dtype=np.int64))


def restored(sample: Sample) -> tuple[list[int], list[list[int]]]:
    """(the text put together from encoder and labels, the spans), by a plain loop; checks everything on the way."""
    decoder, labels = (sample[name][sample["decoder_padding_mask"]].tolist() for name in ("decoder_tokens", "labels"))
    assert decoder[0] == TOKENIZER.bos and decoder[1:] == labels[:-1] and labels[-1] == TOKENIZER.eos
    spans: list[list[int]] = []
    for token in labels[:-1]:
        if token in SENTINELS:
            assert token == SENTINELS[len(spans)]  # in their order
            spans.append([])
        else:
            spans[-1].append(token)
    text: list[int] = []
    number = 0
    for token in sample["encoder_tokens"][sample["encoder_padding_mask"]].tolist():
        if token in SENTINELS:
            assert token == SENTINELS[number]
            text += spans[number]
            number += 1
        else:
            text.append(token)
    assert number == len(spans)
    for mask, tokens in (("encoder_padding_mask", "encoder_tokens"), ("decoder_padding_mask", "decoder_tokens")):
        count = int(sample[mask].sum())
        assert sample[mask][:count].all() and (sample[tokens][count:] == TOKENIZER.pad).all()
    assert (sample["loss_mask"] == sample["decoder_padding_mask"]).all()
    return text, spans


def test_sample() -> None:
    lengths, firsts, lasts = [], 0, 0
    for number in range(400):
        sample = recipe().sample(passage(500), np.random.RandomState(number))
        text, spans = restored(sample)
        assert text == [*range(1000, 1500)]
        assert sum(map(len, spans)) == 75 and len(spans) == 25  # 15% of 500, in spans of 3 on the average
        assert all(b[0] > a[-1] + 1 for a, b in pairwise(spans))  # neighbours do not touch
        lengths += [len(span) for span in spans]
        firsts, lasts = firsts + (spans[0][0] == 1000), lasts + (spans[-1][-1] == 1499)
    assert np.mean(lengths) == 3
    # Geometric, given the sum: P(n) = C(74 - n, 23) / C(74, 24).
    counts = np.bincount(lengths)[1:6] / len(lengths)
    expected = [24 / 74]
    for n in range(1, 5):
        expected.append(expected[-1] * (51 - n) / (74 - n))
    assert counts.tolist() == pytest.approx(expected, abs=0.012)
    assert counts.tolist() == pytest.approx([(1 / 3) * (2 / 3) ** n for n in range(5)], abs=0.02)
    assert 0 < firsts < 60 and 0 < lasts < 60  # a text may begin and end with a span
    assert {name: (value.dtype, value.shape) for name, value in sample.items()} == {
        "encoder_tokens": (np.int64, (512,)),
        "encoder_padding_mask": (np.bool_, (512,)),
        "decoder_tokens": (np.int64, (128,)),
        "decoder_padding_mask": (np.bool_, (128,)),
        "labels": (np.int64, (128,)),
        "loss_mask": (np.float32, (128,)),
    }


def test_divisions_are_uniform() -> None:
    state = np.random.RandomState(0)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        parts = tuple(_divide(5, 3, state).tolist())
        seen[parts] = seen.get(parts, 0) + 1
    assert sorted(seen) == [(1, 1, 3), (1, 2, 2), (1, 3, 1), (2, 1, 2), (2, 2, 1), (3, 1, 1)]
    assert all(900 < count < 1100 for count in seen.values())
    assert _divide(4, 1, state).tolist() == [4] and _divide(4, 4, state).tolist() == [1] * 4


@pytest.mark.parametrize("mask_prob", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean", [1.0, 3.0, 7.5])
@pytest.mark.parametrize(("encoder", "decoder"), [(2, 3), (16, 100), (100, 9), (64, 64)])
def test_no_length_overflows(encoder: int, decoder: int, mean: float, mask_prob: float) -> None:
    made = recipe(encoder, decoder, mask_prob=mask_prob, mean_noise_span_length=mean)
    fullest = [0, 0]
    for length in range(2, made.text_length + 1):
        sample = made.sample(passage(length), np.random.RandomState(length))
        assert restored(sample)[0] == [*range(1000, 1000 + length)]
        counts = [int(sample[f"{stack}_padding_mask"].sum()) for stack in ("encoder", "decoder")]
        fullest = [max(pair) for pair in zip(fullest, counts, strict=True)]
    # One of the two is as good as full, or the text would be longer.
    assert fullest[0] >= encoder - 1 or fullest[1] >= decoder - 2
    assert made.packing.length == made.text_length


def test_the_published_lengths() -> None:
    """512 and 114 tokens make use of 568 of the text (T5's own program calls them inputs and targets, with an end each)."""
    made = recipe(511, 114)
    sample = made.sample(passage(568), np.random.RandomState(0))
    assert made.text_length == 568 and sample["encoder_padding_mask"].all() and sample["decoder_padding_mask"].all()


def build(
    num_samples: tuple[int, int, int] = (60, 8, 0), tokenizer: Tokenizer = TOKENIZER, **settings: object
) -> Datasets:
    cfg = T5Config()
    cfg.model.seq_length, cfg.training.seed = 24, int(settings.pop("seed", 1))  # type: ignore[call-overload]
    cfg.t5.decoder_seq_length = 12
    for name, value in settings.items():
        setattr(cfg.data, name, value)
    return t5_datasets(cfg, tokenizer, num_samples)


def train(**settings: object) -> list[Sample]:
    dataset = build(**settings).train  # type: ignore[arg-type]
    assert dataset is not None
    return [dataset[i] for i in range(len(dataset))]


def test_pure_function_of_seed_and_number(corpus: str) -> None:
    make = partial(train, data_path=[corpus], split="1")
    short, long, other = make(num_samples=(40, 0, 0)), make(num_samples=(600, 0, 0)), make(seed=2)
    assert all(map(same, short, long))
    assert not any(map(same, short, other))
    dataset = build(data_path=[corpus], split="1").train
    assert dataset is not None and same(dataset[33], short[33]) and same(dataset[33], short[33])
    # The same texts in every epoch, cut differently.
    size = dataset.passages.samples_per_epoch  # type: ignore[attr-defined]
    first, second = ({tuple(restored(s)[0]): s for s in long[n * size : (n + 1) * size]} for n in (0, 1))
    assert first.keys() == second.keys()
    assert sorted(token for text in first for token in text) == [*range(4200)]  # every token once
    assert np.mean([same(first[text], second[text]) for text in first]) < 0.1


def test_splits_and_blend(corpus: str, tmp_path: Path) -> None:
    datasets = build((100, 20, 20), data_path=[corpus], split="80,15,5")
    for dataset, low, high in zip(datasets, (0, 3360, 3990), (3360, 3990, 4200), strict=True):
        assert dataset is not None
        seen = [token for i in range(len(dataset)) for token in restored(dataset[i])[0]]
        assert min(seen) >= low and max(seen) < high
    write_sentences(tmp_path / "other", [[[t + 5000 for t in s] for s in d] for d in numbered_sentences([[3, 8]] * 90)])
    blend = build((40, 0, 0), data_path=["1", corpus, "3", str(tmp_path / "other")], split="1").train
    assert isinstance(blend, BlendedDataset)
    assert sum(restored(blend[i])[0][0] < 5000 for i in range(40)) == 10


def test_mock_data() -> None:
    words = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --micro-batch-size 1 --seq-length 64 --mock-data"
    cfg = parse_args([*words.split(), "--vocab-extra-ids", "30"], config_class=T5Config)
    tokenizer = build_tokenizer(cfg.data)
    assert tokenizer.vocab_size == 1054
    first, second = (t5_datasets(cfg, tokenizer, (20, 5, 0)) for _ in range(2))
    assert first.train is not None and second.train is not None and first.valid is not None
    assert all(same(first.train[i], second.train[i]) for i in range(20))
    assert first.train.fingerprint() == second.train.fingerprint() != first.valid.fingerprint()


def test_errors(corpus: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole", numbered([30] * 20))
    for tokenizer, settings, error, message in (
        (TOKENIZER, {"data_path": [str(tmp_path / "whole")]}, DataError, "T5 needs them split.*--split-sentences"),
        (NullTokenizer(9000), {"data_path": [corpus]}, ConfigError, r"0 sentinels.*give --vocab-extra-ids 100"),
        (ByteTokenizer(100), {"data_path": [corpus]}, ConfigError, "neither a bos nor a pad token"),
    ):
        with pytest.raises(error, match=message):
            build(tokenizer=tokenizer, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"100 sentinels.* has up to 114 spans.*--vocab-extra-ids 114"):
        recipe(2048, 2048)
    with pytest.raises(ConfigError, match=r"decoder_seq_length \(2\) at least 3"):
        recipe(64, 2)


def test_own_sentinels(huggingface_folder: Path, tmp_path: Path) -> None:
    """A tokenizer of T5's own kind: descending sentinels, and the pad token starts the decoder."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(huggingface_folder / "tokenizer.json"))
    backend.add_special_tokens(["<pad>", *(f"<extra_id_{i}>" for i in reversed(range(100)))])
    backend.save(str(tmp_path / "tokenizer.json"))
    made = recipe(64, 32, HuggingFaceTokenizer(str(tmp_path)))
    assert made.sentinels.tolist() == [*range(400, 300, -1)] and (made.start, made.pad, made.end) == (300, 300, 299)


def test_samples_are_pinned() -> None:
    """A resumed run must see the same spans under every version of numpy, so this may never change."""
    sample = recipe(20, 8).sample(passage(15), np.random.RandomState(1234))
    assert (sample["encoder_tokens"].tolist(), sample["labels"].tolist()) == PINNED


PINNED = (
    [
        1000,
        1001,
        1002,
        1003,
        1004,
        1005,
        1006,
        1007,
        1008,
        1009,
        1010,
        1011,
        20001,
        1014,
        19997,
        19997,
        19997,
        19997,
        19997,
        19997,
    ],
    [20001, 1012, 1013, 19999, 19997, 19997, 19997, 19997],
)
