"""What LSH merged, in words and as a page: a layer of which everything is known, and texts and files that mean harm."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megatron_lsh.errors import DataError
from megatron_lsh.moe.merges import Merges
from megatron_lsh.observing.report.merges import NO_CLUSTER, LayerMerges, describe, kind_of, load, save
from megatron_lsh.observing.report.merges_page import render
from megatron_lsh.observing.report.page import render as render_report
from megatron_lsh.observing.report.runs import read_run
from tests.fuzzing import SEED, cases, damaged, mutated
from tests.tools.test_report import check, write_run

# Two sequences of four tokens; token number s * 2 + b. Expert 0 has rows of six tokens in three clusters, expert 1 of two.
TEXTS = [["def", " f", "(", "x"], ["):", "\n", "    ", "12"]]
TOKENS = [0, 2, 4, 6, 1, 3, 5, 7]
CLUSTERS = [0, 0, 1, 0, 0, 2, 3, 3]


def layer() -> LayerMerges:
    ones = torch.ones(8, dtype=torch.float64)
    error_N = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.125, 0.0, 0.0, 0.75], dtype=torch.float64)
    merges = Merges(
        layer=5,
        num_experts=2,
        token_N=torch.tensor(TOKENS),
        expert_N=torch.tensor([0] * 6 + [1] * 2),
        cluster_N=torch.tensor(CLUSTERS),
        sent_C=torch.tensor([0, 2, 5, 6]),
        sends_rows=True,
        missed_N=error_N / 2,
        energy_N=ones,
        error_N=error_N * 2,
        output_N=ones * 2,
    )
    return describe(merges, TEXTS)


def test_words_for_what_was_merged() -> None:
    found = layer()
    assert (found.layer, found.tokens, found.rows, found.sent, found.alone) == (5, 8, 8, 4, 2)
    assert found.error == pytest.approx(1.625 / 8) and found.missed == pytest.approx(1.625 / 16)
    first, second = found.largest
    assert (first.expert, first.size, first.error) == (0, 4, pytest.approx(0.875 / 4))
    assert sorted(first.tokens) == sorted([("def", 1), (" f", 1), ("x", 1), ("):", 1)])
    assert (first.sent.before, first.sent.token, first.sent.after) == ("", "def", " f(x")
    assert (second.expert, second.size, second.sent.token, second.sent.before) == (1, 2, "    ", "):\n")
    # Of each cluster the worst row, with what stood for it.
    assert [(row.row.token, row.sent.token, row.size, row.error) for row in found.worst] == [
        ("12", "    ", 2, 0.75), (" f", "def", 4, 0.5),
    ]  # fmt: skip
    assert [(piece.text, piece.cluster, piece.sent) for piece in found.text] == [
        ("def", 0, True), (" f", 0, False), ("(", NO_CLUSTER, True), ("x", 0, False),
    ]  # fmt: skip
    assert found.kinds == [
        ("word", 3, [1.0, 0.0]), ("number", 1, [0.0, 1.0]), ("sign", 2, [1.0, 0.0]), ("space", 1, [0.0, 1.0]),
        ("line end", 1, [1.0, 0.0]),
    ]  # fmt: skip


def test_kinds_of_tokens() -> None:
    for piece, before, kind in (
        (" the", "of", "word"), ("ing", "sum", "inside of a word"), ("_x", "self", "inside of a word"), ("x", "(", "word"),
        ("(x", "f", "word"), ("42", "", "number"), ("):", "x", "sign"), ("    ", ":", "space"), ("\n  ", ":", "line end"),
        ("", "", "other"), ("\ufffd", "", "other"), ("été", " ", "word"),
    ):  # fmt: skip
        assert kind_of(piece, before) == kind, piece


def test_a_page_shows_any_text_as_text(tmp_path: Path) -> None:
    """Decoded tokens are a stranger's: none becomes an element, an attribute, a style or a request."""
    evil = ["</style><script>alert(1)</script>", '" onmouseover="x', "<img src=http://a.b/c>", "&amp;\x00\u202e\ud7ff"]
    found = describe(merges_of(evil), [evil])
    page = render([found], "</title><script>", ["<b>note</b>"])
    assert "img" not in check(page.replace("http:", "")).seen, "and no script, no reference, every element closed"
    assert page.count("<b") == page.count("<body"), "notes are text, too"
    assert "&lt;img·src=http" in page and "\\u202e" in page and "\u202e" not in page and "\x00" not in page
    save([found], tmp_path / "merges.json")
    assert load(tmp_path / "merges.json") == [found]


def merges_of(texts: list[str]) -> Merges:
    rows, ones = torch.arange(len(texts)), torch.ones(len(texts), dtype=torch.float64)
    zeros = torch.zeros_like(rows)
    return Merges(0, 1, rows, zeros, zeros, torch.tensor([1]), False, ones, ones, ones, ones)


def test_the_report_takes_in_what_lies_in_a_runs_folder(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", lsh=True)
    assert "What LSH merges" not in render_report([read_run(place)], "without")
    save([layer()], place / "merges.json")
    page = render_report([read_run(place)], "with")
    check(page)
    assert "What LSH merges" in page and "<code>def</code> 1" in page and "50.0%" in page


def test_fuzz_a_file_of_merges_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "merges.json"
    save([layer()], path)
    whole, refused = path.read_bytes(), 0
    for number in range(cases(60)):
        rng = random.Random(f"merges {SEED} {number}")
        odd = json.dumps([mutated(json.loads(whole)[0], rng)]).encode()
        path.write_bytes(odd if rng.random() < 0.6 else damaged(whole, rng))
        try:
            render(load(path), "fuzz", [])
        except DataError as error:
            assert "see_merges" in str(error)
            refused += 1
    assert refused > 20
