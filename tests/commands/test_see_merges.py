"""python -m megatron_lsh see_merges on a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lsh.commands import see_merges
from megatron_lsh.config import Config
from megatron_lsh.observing.report.merges import load
from tests.inference.test_generate import configure, save
from tests.models.model_helpers import LLAMA_LIKE, make_config
from tests.tools.test_report import check

TEXT = "def f(self, x):\n    return self.x + <b>x</b>\n" * 8


def small(dispatcher: str = "lsh") -> Config:
    cfg = configure()
    cfg.moe.moe_token_dispatcher_type, cfg.lsh.lsh_residual, cfg.training.micro_batch_size = (
        dispatcher,
        "interpolate",
        3,
    )
    return cfg


def test_a_page_of_what_a_checkpoint_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save(tmp_path / "run", small()), tmp_path / "new" / "page.html"
    (tmp_path / "text.py").write_text(TEXT)
    flags = ["--load", str(folder), "--file", str(tmp_path / "text.py"), "--out", str(out), "--device", "cpu"]
    assert see_merges.main(flags) == 0
    said = capsys.readouterr().out
    (layer,) = load(out.with_name("merges.json"))
    assert (layer.layer, layer.tokens, layer.rows) == (1, 3 * 48, 2 * 3 * 48), "3 windows, 2 experts; layer 0 is dense"
    assert 0.19 < layer.sent / layer.rows < 0.23 and f"layer 1: {layer.sent} of 288 rows sent" in said
    assert sum(rows for _, rows, _ in layer.kinds) == layer.rows and 0 < layer.error < 1
    assert "".join(piece.text for piece in layer.text) == TEXT[:48]
    page = out.read_text(encoding="utf-8")
    check(page)
    assert "&lt;" in page and "iteration 2" in page

    # A text of half a window, at a rate of one: every row is sent as it is.
    (tmp_path / "text.py").write_text(TEXT[:20])
    assert see_merges.main([*flags, "--lsh-target-rate", "1"]) == 0
    (layer,) = load(out.with_name("merges.json"))
    assert layer.rows == layer.sent == layer.alone == 40 and layer.missed == 0 and layer.error < 1e-9
    assert not layer.largest and not [row for row in layer.worst if row.error > 1e-9]
    capsys.readouterr()


def test_a_model_of_exact_dispatch_shows_what_lsh_would_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.py").write_text(TEXT)
    files = ["--file", str(tmp_path / "text.py"), "--out", str(tmp_path / "page.html"), "--device", "cpu"]
    assert see_merges.main(["--load", str(save(tmp_path / "run", small("alltoall"))), *files]) == 0
    assert "trained with exact dispatch; this is what LSH would merge" in (tmp_path / "page.html").read_text()
    exactly = load(tmp_path / "merges.json")
    cfg = small("auto")
    cfg.lsh.lsh_scope, cfg.parallel.moe_node_size = "node", 2
    assert see_merges.main(["--load", str(save(tmp_path / "auto", cfg)), *files]) == 0
    assert "exact dispatch" not in (tmp_path / "page.html").read_text()
    assert load(tmp_path / "merges.json") == exactly and exactly[0].largest


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_config(**LLAMA_LIKE, seq_length=48, vocab_size=257)
    dense.data.tokenizer_type = "ByteTokenizer"
    (tmp_path / "text.py").write_text(TEXT)
    flags = ["--load", str(save(tmp_path / "run", small())), "--file", str(tmp_path / "text.py"), "--device", "cpu"]
    flags += ["--out", str(tmp_path / "page.html")]
    for wrong, message in (
        (["--lsh-target-rate", "2"], "--lsh-target-rate (2) must be above 0 and at most 1: change it"),
        (["--sequences", "0"], "--sequences (0) must be at least 1"),
        (["--file", str(tmp_path / "none")], "must be a text in UTF-8 that can be read"),
        (["--out", str(tmp_path)], "must be a file that can be written"),
        (["--load", str(save(tmp_path / "dense", dense))], "must be a model with experts"),
    ):
        assert see_merges.main([*flags, *wrong]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "merges.json").exists(), "nothing is left behind"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert see_merges.main(flags) == 1
    assert "must run on 1 rank, and was started on 2: start it without torchrun" in capsys.readouterr().err
