"""What is tested after a fine-tuning are the weights of its best validation, whatever happened to the run in between."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.training.test_classification import MODEL, RUN, finetune, make_text, write

LENGTH = "--epochs 3 --save-interval 10"


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """The test set is the validation set, so that a test of the same weights finds the same loss."""
    generator = random.Random(0)
    sets = {name: [make_text(generator, n % 2) for n in range(count)] for name, count in (("train", 76), ("valid", 20))}
    sets["test"] = sets["valid"]
    return " ".join(f"--{name}-data {write(tmp_path / f'{name}.jsonl', rows)}" for name, rows in sets.items())


def losses(out: str, split: str) -> dict[int, float]:
    """Of the evaluations of a set, by iteration."""
    found = re.findall(rf"{split} after epoch \d+ \(iteration (\d+)\) \| loss: (\S+)", out)
    return {int(iteration): float(loss) for iteration, loss in found}


def test_a_run_that_goes_on_elsewhere_tests_the_best_of_both(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"{MODEL} {RUN} {LENGTH} {texts}"
    finetune(monkeypatch, f"{base} --save {tmp_path}/a --exit-interval 10")
    first = losses(capsys.readouterr().out, "validation")
    finetune(monkeypatch, f"{base} --load {tmp_path}/a --save {tmp_path}/b --lr 1e-12 --override-opt_param-scheduler")
    out = capsys.readouterr().out
    assert losses(out, "test") == first and list(first) == [10]  # nothing was better after it


def test_weights_of_an_abandoned_attempt_are_not_taken_for_the_best(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"{MODEL} {RUN} {LENGTH} {texts} --save {tmp_path}/a --load {tmp_path}/a --lr 5e-4"
    finetune(monkeypatch, f"{base} --exit-interval 20")
    assert [path.name for path in (tmp_path / "a" / "best").glob("iter_*")] == ["iter_0000020"]
    capsys.readouterr()
    finetune(monkeypatch, f"{base} --ckpt-step 10 --lr 1e-12 --override-opt_param-scheduler")
    out = capsys.readouterr().out
    assert "WARNING: the weights of the best validation, of iteration 10, are not in " in out
    tested, validated = losses(out, "test"), losses(out, "validation")
    assert list(tested.values()) == [validated[30]]


def test_other_classes_begin_with_a_new_head_and_the_best_keeps_its_own(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(monkeypatch, f"{MODEL} {RUN} {LENGTH} {texts} --save {tmp_path}/a --epochs 1")
    assert "start afresh" not in capsys.readouterr().out
    for path in tmp_path.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"low"', '"small"').replace('"high"', '"large"'))
    words = f"{MODEL} {RUN} {texts} --pretrained-checkpoint {tmp_path}/a --save {tmp_path}/b --load {tmp_path}/b"
    finetune(monkeypatch, f"{words} --epochs 6 --early-stopping-patience 1 --lr 0.03")
    out = capsys.readouterr().out
    assert re.search("start afresh.*classification_head.weight", out)
    (iteration, loss), validated = losses(out, "test").popitem(), losses(out, "validation")
    assert iteration < max(validated) and loss == validated[iteration]  # not the last ones, and with their head
