"""Fine-tuning for classification, whole runs: it learns, it keeps the best, it goes on after a stop; every mistake."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lsh.config import (
    BertConfig,
    ClassificationConfig,
    parse_args,
    parse_classification_args,
    to_json,
    validate,
)
from megatron_lsh.config.settings import settings_of
from megatron_lsh.errors import CheckpointError, ConfigError, DataError
from megatron_lsh.families import GPT
from megatron_lsh.observing.state import TrainState
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.plan.dry_run import dry_run
from megatron_lsh.training.early_stopping import EarlyStopping
from megatron_lsh.training.main import configure
from megatron_lsh.training.train import train
from tests.training.helpers import tiny_config

ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --attention-dropout 0 "
    "--hidden-dropout 0 --make-vocab-size-divisible-by 32 --num-experts 4 --moe-ffn-hidden-size 32 "
    "--moe-aux-loss-coeff 1e-2 --tokenizer-type NullTokenizer --vocab-size 63"
)
NUMBERS = "--tokenizer-type NullTokenizer --vocab-size 63"
RUN = (
    "--micro-batch-size 4 --global-batch-size 8 --lr 5e-3 --lr-decay-style constant --num-workers 0 --log-interval 100 "
    "--no-progress --peak-tflops 1 --device cpu"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (76 texts), valid.jsonl (20), test.jsonl (13): numbers up to 24 are "low", from 25 on "high"."""
    folder = tmp_path_factory.mktemp("texts")
    generator = random.Random(0)
    for name, count in (("train", 76), ("valid", 20), ("test", 13)):
        write(folder / f"{name}.jsonl", [make_text(generator, number % 2) for number in range(count)])
    return folder


def make_text(generator: random.Random, high: int) -> tuple[str, str]:
    numbers = [generator.randrange(25) + 25 * high for _ in range(generator.randrange(2, 13))]
    return " ".join(map(str, numbers)), ("low", "high")[high]


def write(path: Path, rows: list[tuple[Any, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def sets(folder: Path, *names: str) -> str:
    return " ".join(f"--{name}-data {folder}/{name}.jsonl" for name in names)


def configured(monkeypatch: pytest.MonkeyPatch, flags: str) -> Any:
    """What the entry script makes of a command line."""
    monkeypatch.setattr("sys.argv", ["finetune_classification.py", *shlex.split(flags)])
    return configure(parse_classification_args())


def finetune(monkeypatch: pytest.MonkeyPatch, flags: str) -> TrainState:
    return train(*configured(monkeypatch, flags))


def validations(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(path) if "validation_loss" in record]


def test_early_stopping() -> None:
    watcher = EarlyStopping("f1", patience=2)
    assert [watcher.observe(i, {"f1": f1}) for i, f1 in enumerate((0.5, 0.4, 0.6))] == [True, False, True]
    assert not watcher.observe(3, {"f1": 0.6}) and not watcher.stopped  # the first of equals is the best
    assert not watcher.observe(4, {"f1": 0.1}) and watcher.stopped
    assert (watcher.best, watcher.best_iteration) == ({"f1": 0.6}, 2)
    again = EarlyStopping("f1", patience=3)
    again.load_state_dict(json.loads(json.dumps(watcher.state_dict())))
    assert not again.stopped and again.state_dict() == watcher.state_dict()
    other = EarlyStopping("accuracy")
    other.load_state_dict(watcher.state_dict())
    assert other.best_iteration is None and not other.stopped


# Runs


def test_it_learns_and_keeps_the_best(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the weights of a pretraining run, whose config.json describes the model; then evaluated by itself."""
    pretrained = tiny_config(
        f"--train-iters 2 --save {tmp_path}/gpt --untie-embeddings-and-output-weights --seq-length 16 "
        f"--metrics-jsonl {tmp_path}/gpt/m.jsonl"
    )
    train(pretrained, GPT)
    before = (tmp_path / "gpt" / "m.jsonl").read_bytes()
    flags = (
        f"--config {tmp_path}/gpt/config.json --pretrained-checkpoint {tmp_path}/gpt {NUMBERS} {RUN} "
        f"{sets(folder, 'train', 'valid', 'test')} --epochs 9 --early-stopping-patience 1 --save {tmp_path}/tuned "
        f"--metrics-jsonl {tmp_path}/tuned/m.jsonl --tensorboard-dir {tmp_path}/tb --moe-token-dispatcher-type lsh "
        "--lsh-eval both"
    )
    capsys.readouterr()
    state = finetune(monkeypatch, flags)
    out = capsys.readouterr().out
    assert "not in the checkpoint, so they start afresh: classification_head.bias; classification_head.weight. " in out
    assert "in the checkpoint only, and not used: output_layer.weight\n" in out
    assert "train set: 76 texts of 2 classes, 8 tokens on average; none was cut" in out
    records = validations(tmp_path / "tuned" / "m.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    assert [record["iteration"] for record in records] == [10 * epoch for epoch in range(1, len(records) + 1)]
    accuracies = [record["validation_accuracy"] for record in records]
    best = int(np.argmax(accuracies))
    assert accuracies[best] > 0.9 and "validation_accuracy_exact" in records[0]
    assert len(records) == best + 2 < 9 and state.iteration == 10 * len(records)  # patience 1
    assert f"stopped after iteration {state.iteration}; the best was" in out
    assert [path.name for path in sorted((tmp_path / "tuned" / "best").glob("iter_*"))] == [
        f"iter_{10 * (best + 1):07d}"
    ]
    assert f"test after epoch {best + 1} (iteration {10 * (best + 1)}) | loss: " in out
    last_line = out.strip().splitlines()[-1]
    assert last_line.startswith(f"result: validation loss {records[best]['validation_loss']:.4f}, accuracy")
    assert (tmp_path / "gpt" / "m.jsonl").read_bytes() == before  # nothing of that run was touched

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert {"accuracy validation", "macro f1 validation exact", "lm loss validation"} <= set(board.Tags()["scalars"])

    # A finished run is not trained further; the best weights by themselves give the same figures.
    assert finetune(monkeypatch, f"{flags} --load {tmp_path}/tuned").iteration == state.iteration
    alone = f"--config {tmp_path}/tuned/config.json {NUMBERS} --load {tmp_path}/tuned/best --skip-train"
    finetune(monkeypatch, f"{alone} --metrics-jsonl {tmp_path}/alone.jsonl")
    (found,) = validations(tmp_path / "alone.jsonl")
    assert {key: found[key] for key in found if key in records[best]} == {
        key: records[best][key] for key in found if key in records[best]
    }
    for wrong, message in (
        (f"{flags} --load {tmp_path}/tuned --classes low high", "--classes is"),
        (f"{flags} --load {tmp_path}/gpt --skip-train", "classification_head.weight is not in the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            try:
                finetune(monkeypatch, wrong)
            finally:
                torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = f"{MODEL} {RUN} {sets(folder, 'train', 'valid')} --epochs 4 --early-stopping-patience 3 --pooling mean"
    for name, stops in (("one", [""]), ("two", ["--exit-interval 10", "--exit-interval 13", "--exit-interval 27", ""])):
        save = f"--save {tmp_path}/{name} --metrics-jsonl {tmp_path}/{name}.jsonl"
        for number, stop in enumerate(stops):
            finetune(monkeypatch, f"{flags} {save} {stop}" + (f" --load {tmp_path}/{name}" if number else ""))
    one, two = (validations(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert one == two and len(one) == 4
    states = [next((tmp_path / name).glob("iter_0000040/state.json")) for name in ("one", "two")]
    watchers = [json.loads(path.read_text())["extra"]["early_stopping"] for path in states]
    assert watchers[0] == watchers[1] and watchers[0]["best_iteration"] is not None


@pytest.mark.slow
def test_epochs_stay_epochs_under_another_batch_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """76 texts: 10 iterations an epoch of 8, and 19 of 4. Stopped after 24 texts of the second one."""
    flags = f"{MODEL} {RUN} {sets(folder, 'train', 'valid', 'test')} --epochs 4 --save {tmp_path}/run"
    flags += f" --metrics-jsonl {tmp_path}/m.jsonl"
    finetune(monkeypatch, f"{flags} --exit-interval 13")
    capsys.readouterr()
    state = finetune(monkeypatch, f"{flags} --load {tmp_path}/run --global-batch-size 4")
    assert (state.iteration, state.consumed_samples) == (13 + 13 + 2 * 19, 4 * 76)
    found = [(record["epoch"], record["iteration"]) for record in validations(tmp_path / "m.jsonl")]
    assert found == [(1, 10), (2, 26), (3, 45), (4, 64)]
    out = capsys.readouterr().out
    assert "the global batch size is 4, and was 8 in the checkpoint" in out and "training data" not in out
    best = max(validations(tmp_path / "m.jsonl"), key=lambda record: record["validation_accuracy"])
    assert f"test after epoch {best['epoch']:g} (iteration {best['iteration']})" in out


@pytest.mark.parametrize("backbone", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_other_backbones_learn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    positions = "--position-embedding-type relative" if backbone == "t5" else ""
    finetune(
        monkeypatch,
        f"{MODEL} {RUN} {sets(folder, 'train', 'valid')} --backbone {backbone} {positions} --epochs 5 "
        f"--metrics-jsonl {tmp_path}/m.jsonl",
    )
    assert max(record["validation_accuracy"] for record in validations(tmp_path / "m.jsonl")) > 0.9


def test_zero_shot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = tiny_config(f"--train-iters 2 --save {tmp_path}/gpt --seq-length 16")
    train(pretrained, GPT)
    flags = (
        f"--config {tmp_path}/gpt/config.json --pretrained-checkpoint {tmp_path}/gpt {NUMBERS} {RUN} "
        f"{sets(folder, 'valid')} --zero-shot --classes low high --class-texts 24 49"
    )
    capsys.readouterr()
    finetune(monkeypatch, f"{flags} --prompt-template '{{text}} 62'")
    assert "validation at iteration 0 | loss: " in (out := capsys.readouterr().out)
    assert (
        out.strip().splitlines()[-1].startswith("result: validation loss") and "valid set: 20 texts of 2 classes" in out
    )


def _on_two_ranks(arguments: str) -> tuple[int, dict[str, Any]]:
    """Iterations done, and the last that early stopping saw."""
    seen: dict[str, Any] = {}
    real = EarlyStopping.observe

    def observe(self: EarlyStopping, iteration: int, figures: Mapping[str, float], epoch: float | None = None) -> bool:
        better = real(self, iteration, figures, epoch)
        seen.update(self.state_dict())
        return better

    EarlyStopping.observe = observe  # type: ignore[method-assign] - this process is the test's own
    return train(*configure(parse_classification_args(arguments.split()))).iteration, seen


@pytest.mark.slow
def test_two_ranks_with_lsh_learn_and_agree(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EP 2, compressed. Of 20 texts, in micro-steps of 2 x 4, the last leaves one rank nothing but padding."""
    common = f"{MODEL} --micro-batch-size 4 {RUN} {sets(folder, 'train', 'valid', 'test')} --early-stopping-patience 2"
    flags = (
        f"{common} --epochs 5 --save {tmp_path}/run --metrics-jsonl {tmp_path}/m.jsonl --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type lsh"
    )
    one, two = run_distributed_test(_on_two_ranks, 2, flags)
    assert one == two
    records = validations(tmp_path / "m.jsonl")
    best = max(records, key=lambda record: record["validation_accuracy"])
    assert best["validation_accuracy"] > 0.9 and best["validation_accuracy"] == one[1]["best"]["accuracy"]
    # The same weights on one rank, every row sent: each text counts exactly once there and here.
    evaluate = f"{common} --load {tmp_path}/run/best --skip-train --metrics-jsonl"
    finetune(monkeypatch, f"{evaluate} {tmp_path}/one.jsonl")
    run_distributed_test(_on_two_ranks, 2, f"{evaluate} {tmp_path}/two.jsonl --expert-model-parallel-size 2")
    (on_one,), (on_two,) = (validations(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert on_one.keys() == on_two.keys()
    assert on_one == pytest.approx(on_two, rel=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-iters 5", r"training.train_iters \(5\) must not be given: set --epochs"),
        ("--eval-interval 5", r"training.eval_interval \(5\) must not be given"),
        (
            "--data-path x",
            r"data.data_path \(\['x'\]\) must not be given: drop --data-path, and give labelled texts by",
        ),
        ("--mock-data", r"data.mock_data \(True\) must be off"),
        ("--sample-prompt x", r"logging.sample_prompt \(x\) must not be given"),
        ("--hf-dataset x", r"finetune.train_data .* must not be given with finetune.hf_dataset"),
        (
            "--early-stopping-patience 1",
            r"early_stopping_patience \(1\) must not be given without a folder.*: set --save",
        ),
        ("--classes a", r"finetune.classes \(\['a'\]\) must be at least 2"),
        ("--classes a a", r"finetune.classes \(\['a', 'a'\]\) must be different names"),
        ("--text-keys a b c", r"finetune.text_keys .* must be one column, or the two of a pair"),
        ("--class-texts a b", r"finetune.class_texts .* must not be given without --zero-shot"),
        ("--epochs 0", r"checkpoint.load \(absent\) must be given: only a fine-tuned model can be evaluated"),
        ("--zero-shot", r"checkpoint.pretrained_checkpoint \(absent\) must be given with --zero-shot"),
        ("--zero-shot --backbone bert", r"finetune.zero_shot \(True\) must be off with finetune.backbone \(bert\)"),
        ("--task stsb", r"finetune.task \(stsb\) must be one of cola, sst2"),
        ("--backbone rnn", r"finetune.backbone \(rnn\) must be one of gpt, bert, t5"),
        ("--classes low high other", r"train.jsonl has no text of class other"),
        ("--classes low other", r"train.jsonl has no text of class other"),
        (
            "--classification-metric f1 --train-data {three} --valid-data {three}",
            r"\(f1\) is for 2 classes, and there are 3",
        ),
        (
            "--valid-data {three}",
            r"three.jsonl, line 3: the label \(middle\) must be one of the 2 classes \(high, low\)",
        ),
        ("--train-data {empty}", r"empty.jsonl, line 2: the text is empty"),
        ("--train-data {single}", r"single.jsonl has one class \(low\), and there must be at least 2"),
        ("--train-data {missing}", r"missing.jsonl does not exist"),
        ("--label-key kind", r"line 1 has no column kind, only text, label"),
        ("--no-truncate --seq-length 4", r"train.jsonl, line \d+: the text has \d+ tokens, more than the 3"),
        (
            "--backbone bert --vocab-size 15 --train-data {words} --valid-data {words}",
            r"has no \[CLS\] or \[SEP\] token",
        ),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str) -> None:
    low, high, middle = ("1 2", "low"), ("30 31", "high"), ("20", "middle")
    paths = {
        "three": write(tmp_path / "three.jsonl", [low, high, middle]),
        "empty": write(tmp_path / "empty.jsonl", [low, ("", "high")]),
        "single": write(tmp_path / "single.jsonl", [low, low]),
        "words": write(tmp_path / "words.jsonl", [low, ("3", "high")]),
        "missing": tmp_path / "missing.jsonl",
    }
    line = f"{MODEL} {RUN} {sets(folder, 'train', 'valid')} {flags.format(**paths)}"
    with pytest.raises((ConfigError, DataError), match=message):
        configured(monkeypatch, line)


def test_what_comes_from_a_pretraining_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, experts, dispatcher and tokenizer, and nothing else of its config.json."""
    words = f"{MODEL} {RUN} --train-iters 7 --mock-data --save {tmp_path}/b --bert-no-binary-head"
    words += " --moe-token-dispatcher-type lsh"
    (tmp_path / "config.json").write_text(to_json(validate(parse_args(words.split(), BertConfig), 1)))
    line = f"--config {tmp_path}/config.json {sets(folder, 'train')} --micro-batch-size 2 --lr 1 --seq-length 8"
    cfg, _ = configured(monkeypatch, line)
    assert (
        cfg.finetune.backbone == "bert" and not cfg.bert.bert_binary_head and cfg.moe.moe_token_dispatcher_type == "lsh"
    )
    assert (cfg.model.seq_length, cfg.model.max_position_embeddings, cfg.data.tokenizer_type) == (
        8,
        16,
        "NullTokenizer",
    )
    assert cfg.checkpoint.save is None and cfg.training.train_iters == 3 * 38 and cfg.training.eval_interval == 38
    assert cfg.training.global_batch_size == 2 and not cfg.data.mock_data and cfg.finetune.classes == ["high", "low"]
    assert any("are those of" in notice for notice in cfg.notices)
    with pytest.raises(ConfigError, match=r"finetune.backbone \(gpt\) must be bert, the model of --config"):
        parse_classification_args([*line.split(), "--backbone", "gpt"])
    assert type(parse_classification_args([])) is ClassificationConfig
    # The other way: a folder without --config is pointed to its file.
    cfg = parse_classification_args(f"--pretrained-checkpoint {tmp_path} {sets(folder, 'train')}".split())
    assert f"add --config {tmp_path}/config.json: it describes the pretrained model" in cfg.notices


def test_the_launcher_starts_a_valid_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scripts/finetune_newsgroups.sh hands to torchrun passes every check, data included."""
    cfg = validate(parse_args(f"{MODEL} {RUN} --train-iters 7 --mock-data".split()), 1)
    (tmp_path / "config.json").write_text(to_json(cfg))
    env = {**os.environ, "TORCHRUN": "echo", "NPROC": "2", "DATA_DIR": str(folder), "RUN_DIR": str(tmp_path / "run")}
    command = [ROOT / "scripts" / "finetune_newsgroups.sh", tmp_path, "--epochs", "5", *NUMBERS.split()]
    words = subprocess.run(command, env=env, check=True, text=True, capture_output=True).stdout.split()
    assert "--nproc-per-node" in words[: words.index("finetune_classification.py")]
    written = parse_classification_args(words[words.index("finetune_classification.py") + 1 :])
    monkeypatch.setenv("WORLD_SIZE", "2")
    tuned: Any = configure(written)[0]
    assert tuned.training.train_iters == 5 * 3 and tuned.parallel.expert_model_parallel_size == 2
    assert tuned.examples == 76
    command[1] = tmp_path / "nothing"
    refused = subprocess.run(command, env=env, check=False, text=True, capture_output=True)
    assert refused.returncode == 1 and "has no config.json" in refused.stderr


def test_the_document_names_every_flag_and_a_dry_run_needs_no_texts(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "finetuning.md").read_text()
    for setting in settings_of(ClassificationConfig).values():
        if setting.section == "finetune":
            assert f"`{setting.flag}`" in page.split("## Flags")[1], setting.flag
    for backbone in ("gpt", "bert", "t5"):
        cfg = parse_classification_args(f"{MODEL} {RUN} --backbone {backbone} --dry-run".split())
        assert "Nothing was started and no data was read." in dry_run(validate(cfg, 1))
