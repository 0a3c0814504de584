"""Models that were trained here from the start: they find their architecture, and their tokenizer comes along."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from megatron_lsh.checkpoint import CheckpointManager, TrainingState
from megatron_lsh.config import Config, MoEConfig, parse_args, to_saved
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.kept_tokenizer import KEPT, tokenizer_contents
from megatron_lsh.convert import load_hf, load_native, save_hf, save_native, upcycle
from megatron_lsh.convert.native import find_native, read_config
from megatron_lsh.data.tokenizers import build_tokenizer
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.parallel.context import offline_context
from tests.convert.helpers import QUIET
from tests.convert.tiny import hf_logits, load_pretrained, prompts, save_tiny
from tests.data.conftest import TEXTS, gpt2_files, huggingface_folder, sentencepiece_model  # noqa: F401 (fixtures)
from tests.models.model_helpers import LLAMA_LIKE, MOE, make_config, make_gpt, randomize

DENSE = {**LLAMA_LIKE, "group_query_attention": False, "num_query_groups": 1}


def trained(folder: Path, vocab: int, **settings: Any) -> tuple[Config, GPTModel]:
    """A checkpoint as a run leaves it."""
    cfg = make_config(vocab_size=vocab, **settings)
    cfg.model.num_query_groups = cfg.model.num_query_groups if cfg.model.group_query_attention else 4
    model = make_gpt(cfg, vocab_size=384)
    randomize(model)
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    rows = {name: vocab for name, _ in model.named_parameters() if name in names}
    manager = CheckpointManager(
        CheckpointConfig(save=str(folder)), offline_context(device="cpu"), notify=lambda text: None
    )
    files = {f"{KEPT}/{name}": content for name, content in tokenizer_contents(cfg.data).items()}
    config = to_saved(cfg)["config"]
    manager.save(TrainingState(model, config=config, progress={"iteration": 7}, padded_rows=rows, files=files))
    return cfg, model.eval()


@torch.no_grad()
def check_export(folder: Path, model: GPTModel, vocab: int, model_type: str) -> Any:
    exported = load_pretrained(folder)
    assert exported.config.model_type == model_type
    with exact_dispatch(model):
        logits = model(prompts())
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(hf_logits(exported, prompts()), logits[..., :vocab], rtol=0, atol=2e-5)
    return exported.config


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer"])
def test_tokenizers(kind: str, sentencepiece_model: Path, huggingface_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    place = sentencepiece_model
    if kind == "HuggingFaceTokenizer":
        place = shutil.copytree(huggingface_folder, tmp_path / "tokenizer")
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (place / "tokenizer_config.json").write_text(json.dumps(names))
    settings = {**LLAMA_LIKE, **MOE, "moe_layer_freq": "1", "tokenizer_type": kind, "tokenizer_model": str(place)}
    cfg, model = trained(tmp_path / "run", 320, **settings)
    save_hf(load_native(tmp_path / "run"), tmp_path / "hf", checks=QUIET)
    config = check_export(tmp_path / "hf", model, 320, "mixtral")
    ours, theirs = build_tokenizer(cfg.data, None), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == theirs.eos_token_id == ours.eod
    for text in TEXTS[:4]:
        assert theirs(text).input_ids == ours.tokenize(text)


def test_architectures(tmp_path: Path) -> None:
    qk_norm = {"qk_layernorm": True, "untie_embeddings_and_output_weights": False}
    moe = {**MOE, "moe_layer_freq": "1"}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("llama", DENSE),
        ("qwen3", {**LLAMA_LIKE, **qk_norm}),
        ("mixtral", {**DENSE, **moe, "moe_token_dispatcher_type": "lsh", "lsh_residual": "lowrank"}),
        ("qwen3_moe", {**LLAMA_LIKE, **MOE, **qk_norm}),
        ("olmoe", {**LLAMA_LIKE, **moe, **qk_norm, "qk_layernorm_width": "full", "moe_router_pre_softmax": True}),
        (
            "qwen2_moe",
            {
                **LLAMA_LIKE,
                **MOE,
                "add_qkv_bias": True,
                "moe_shared_expert_intermediate_size": 20,
                "moe_shared_expert_gate": True,
            },
        ),
    ]
    for model_type, settings in cases:
        _, model = trained(tmp_path / model_type, 300, **settings)
        save_hf(load_native(tmp_path / model_type), tmp_path / f"{model_type}_hf", checks=QUIET)
        config = check_export(tmp_path / f"{model_type}_hf", model, 300, model_type)
        assert config.eos_token_id is None, "no tokenizer, no id, and not the architecture's default"


def test_what_no_architecture_is(tmp_path: Path) -> None:
    trained(tmp_path / "gpt2", 300)
    with pytest.raises(
        CheckpointError, match=r"no Hugging Face architecture .* --normalization is LayerNorm, not RMSNorm"
    ):
        save_hf(load_native(tmp_path / "gpt2"), tmp_path / "hf", checks=QUIET)
    assert not (tmp_path / "hf").exists()


def test_upcycled_runs_keep_their_tokenizer(sentencepiece_model: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = {**DENSE, "tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(sentencepiece_model)}
    trained(tmp_path / "dense", 320, **settings)
    save_native(upcycle(load_native(tmp_path / "dense"), MoEConfig(num_experts=4)), tmp_path / "moe", checks=QUIET)
    source = load_native(tmp_path / "moe")
    assert source.cfg.data.tokenizer_type == "Llama2Tokenizer" and source.cfg.moe.num_experts == 4
    save_hf(source, tmp_path / "hf", checks=QUIET)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()


@pytest.mark.parametrize("kind", ["Llama2Tokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer"])
def test_a_checkpoint_holds_its_tokenizer(
    kind: str,
    sentencepiece_model: Path,  # noqa: F811
    huggingface_folder: Path,  # noqa: F811
    gpt2_files: dict[str, str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Moved, read from another folder, the run's own files gone, another tokenizer where a relative path would lead."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(sentencepiece_model, "tokenizer.model")
    shutil.copytree(huggingface_folder, "tokenizer")
    files: dict[str, dict[str, str]] = {
        "Llama2Tokenizer": {"tokenizer_model": "tokenizer.model"},
        "HuggingFaceTokenizer": {"tokenizer_model": "tokenizer"},
        "GPT2BPETokenizer": {name: shutil.copy(path, name) for name, path in gpt2_files.items()},
    }
    cfg, _ = trained(here / "run", 320, **{**LLAMA_LIKE, "tokenizer_type": kind, **files[kind]})
    expected = build_tokenizer(cfg.data).tokenize(TEXTS[0])
    eod = build_tokenizer(cfg.data).eod
    shutil.move(here / "run", tmp_path / "moved")
    shutil.rmtree(here)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "tokenizer.model").write_text("another")
    (elsewhere / "tokenizer").mkdir()

    said: list[str] = []
    source = load_native(tmp_path / "moved")
    save_hf(source, tmp_path / "hf", checks=replace(QUIET, verify=True, logits=False, say=said.append))
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == eod
    assert any(line.startswith("verified: the tokenizer gives the ids of training") for line in said), said
    folder = find_native(tmp_path / "moved", None)
    assert build_tokenizer(read_config(folder).data).tokenize(TEXTS[0]) == expected
    again = parse_args(["--config", str(folder / "config.json")])
    assert build_tokenizer(again.data).tokenize(TEXTS[0]) == expected

    save_native(source, tmp_path / "converted", checks=QUIET)
    shutil.move(tmp_path / "converted", tmp_path / "away")
    assert load_native(tmp_path / "away").origin.tokenizer is not None
    (folder / KEPT / "stray.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"stray\.json is no file of this checkpoint"):
        load_native(tmp_path / "moved")


def test_a_relative_path_of_an_older_checkpoint_leads_nowhere(
    sentencepiece_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**DENSE, "tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "tokenizer.model"}
    trained(tmp_path / "run", 320, **settings)  # when there was no such file, nothing could be kept
    monkeypatch.chdir(tmp_path)
    shutil.copy(sentencepiece_model, "tokenizer.model")
    source = load_native(tmp_path / "run")
    assert source.origin.files == {} and source.cfg.data.tokenizer_model is None
    notices = "\n".join(source.notices)
    assert "data.tokenizer_model (tokenizer.model) lies in a folder that the checkpoint does not name" in notices
    assert "an export has neither tokenizer nor end token" in notices


def test_files_of_a_converted_model_that_its_manifest_does_not_list_stay_behind(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf", "llama")
    save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=QUIET)
    (tmp_path / "native/release/hf/tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y"]}}')
    assert "tokenizer_config.json" not in load_native(tmp_path / "native").origin.files
