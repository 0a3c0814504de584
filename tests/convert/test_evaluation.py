"""The exported model in lm-evaluation-harness: what it says there is what the model says here."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("transformers")

import transformers

from megatron_lsh.convert import load_native, save_hf
from megatron_lsh.data.tokenizers import Tokenizer, build_tokenizer
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.moe.schedule import exact_dispatch
from tests.convert.helpers import QUIET
from tests.convert.test_own_models import DENSE, trained
from tests.convert.tiny import load_pretrained
from tests.models.model_helpers import MOE

ROOT = Path(__file__).parents[2]
TASK = ROOT / "scripts" / "lm_eval" / "python_code.yaml"


def questions() -> list[dict[str, Any]]:
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    lines = (ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_local_task_is_one_that_guessing_does_not_solve() -> None:
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    assert task["task"] == TASK.stem and task["dataset_path"] == "json" and task["output_type"] == "multiple_choice"
    assert (task["doc_to_text"], task["doc_to_choice"], task["doc_to_target"]) == ("{{code}}", "{{choices}}", "answer")
    found = questions()
    assert len(found) >= 20 and len({question["code"] for question in found}) == len(found)
    for question in found:
        assert len(set(question["choices"])) == 4 and 0 <= question["answer"] < 4
        assert question["code"] == question["code"].rstrip(), "spaces belong to the choice, as to a tokenizer's words"
    places = [question["answer"] for question in found]
    assert max(places.count(place) for place in range(4)) < len(found) / 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPTModel, Tokenizer]:
    """A model that was trained here, exported with its tokenizer; dispatch was LSH, which an export knows nothing of."""
    folder = tmp_path_factory.mktemp("exported")
    sizes = {**DENSE, **MOE, "moe_layer_freq": "1", "seq_length": 256, "max_position_embeddings": 256}
    settings = {**sizes, "tokenizer_type": "ByteTokenizer", "moe_token_dispatcher_type": "lsh"}
    cfg, model = trained(folder / "run", 257, **settings)
    save_hf(load_native(folder / "run"), folder / "hf", checks=QUIET)
    return folder / "hf", model, build_tokenizer(cfg.data)


@torch.no_grad()
def log_likelihood(model: GPTModel, tokenizer: Tokenizer, code: str, choice: str) -> float:
    """log p(choice | code) by this framework alone: the choice's tokens are those behind the code's."""
    before, ids = tokenizer.tokenize(code), tokenizer.tokenize(code + choice)
    with exact_dispatch(model):
        logits = model(torch.tensor([ids]))
    assert isinstance(logits, torch.Tensor)
    logs_SV = logits[0, :, : tokenizer.vocab_size].double().log_softmax(-1)
    return sum(float(logs_SV[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def test_an_export_is_what_an_evaluation_reads(exported: tuple[Path, GPTModel, Tokenizer]) -> None:
    """Weights, tokenizer and end token are in the folder; probabilities of answers are the model's own."""
    folder, model, ours = exported
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).is_file()
    theirs, loaded = transformers.AutoTokenizer.from_pretrained(folder), load_pretrained(folder)
    assert theirs.eos_token_id == loaded.config.eos_token_id == ours.eod
    for question in questions()[:5]:
        code, choice = question["code"], question["choices"][question["answer"]]
        before, ids = (theirs(text, return_tensors="pt").input_ids for text in (code, code + choice))
        with torch.no_grad():
            logs_SV = loaded(ids).logits[0].double().log_softmax(-1)
        found = sum(float(logs_SV[place - 1, ids[0, place]]) for place in range(before.shape[1], ids.shape[1]))
        assert found == pytest.approx(log_likelihood(model, ours, code, choice), abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'megatron-lsh[evaluation]'")
def test_lm_evaluation_harness_finds_the_probabilities_that_the_model_gives(
    exported: tuple[Path, GPTModel, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented command, in this process: every answer's log-likelihood against the model here."""
    from lm_eval.__main__ import cli_evaluate

    folder, model, tokenizer = exported
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = f"lm_eval run --model hf --model_args pretrained={folder},dtype=float32 --tasks python_code"
    command += f" --include_path {TASK.parent} --device cpu --log_samples --output_path {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", command.split())
    cli_evaluate()
    (results,) = (tmp_path / "out").glob("*/results_*.json")
    (samples,) = (tmp_path / "out").glob("*/samples_python_code_*.jsonl")
    asked, right = questions(), 0
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        question = asked[sample["doc_id"]]
        expected = [log_likelihood(model, tokenizer, question["code"], choice) for choice in question["choices"]]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        right += max(range(4), key=expected.__getitem__) == question["answer"]
    accuracy = json.loads(results.read_text(encoding="utf-8"))["results"]["python_code"]["acc,none"]
    assert accuracy == pytest.approx(right / len(asked))
