"""Hugging Face -> native -> Hugging Face: every bit, every type, every layout that files come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import save_file

from megatron_lsh.checkpoint.inspection import inspect
from megatron_lsh.convert import (
    CastSource,
    Checks,
    load_hf,
    load_native,
    save_hf,
    save_native,
    with_reference,
)
from megatron_lsh.convert.verify import verify_copy
from megatron_lsh.errors import CheckpointError
from tests.convert.helpers import QUIET, assert_bit_equal, hf_tensors, native_tensors
from tests.convert.tiny import (
    FAMILIES,
    MOE_FAMILIES,
    VOCAB,
    hf_logits,
    load_pretrained,
    prompts,
    save_tiny,
    tiny_model,
)

TYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(("number", "family"), enumerate(FAMILIES))
def test_every_bit_and_type_survives(number: int, family: str, tmp_path: Path) -> None:
    """All types with the first mixture of experts; each other family with one of them in turn."""
    for dtype in TYPES if family == MOE_FAMILIES[0] else TYPES[number % 3 :][:1]:
        folder = tmp_path / str(dtype)
        said: list[str] = []
        save_tiny(folder / "hf", family, dtype)
        checks = Checks(logits_with=folder / "hf", say=said.append)
        save_native(load_hf(folder / "hf"), folder / "native", checks=checks)
        assert any("agree" in line for line in said) and any("SHA-256 equal" in line for line in said)
        (info,) = inspect(folder / "native", hashes=True)
        assert info.valid and info.tracked

        save_hf(load_native(folder / "native"), folder / "back", max_shard=8_000, checks=QUIET)
        assert len(list((folder / "back").glob("*.safetensors"))) > 2
        assert_bit_equal(hf_tensors(folder / "back"), hf_tensors(folder / "hf"))
        before, after = (load_pretrained(folder / name, dtype) for name in ("hf", "back"))
        assert torch.equal(hf_logits(after, prompts()), hf_logits(before, prompts()))
        assert json.loads((folder / "back" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_fused_layout(family: str, tmp_path: Path) -> None:
    """transformers 5 holds experts stacked in memory; files in that layout are read as well."""
    model = save_tiny(tmp_path / "hub", family, torch.bfloat16)
    fused = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    if model.config.tie_word_embeddings:
        assert fused["lm_head.weight"].equal(fused["model.embed_tokens.weight"])  # stored twice: accepted if equal
        fused["lm_head.weight"] = fused["lm_head.weight"].clone()
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_bytes((tmp_path / "hub" / "config.json").read_bytes())
    save_file(fused, tmp_path / "fused" / "model.safetensors")
    hub, other = load_hf(tmp_path / "hub"), load_hf(tmp_path / "fused")
    assert_bit_equal(native_tensors(other), native_tensors(hub))
    save_hf(other, tmp_path / "back", checks=QUIET)
    assert_bit_equal(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hub"))


def test_types_that_differ_between_tensors(tmp_path: Path) -> None:
    """Each tensor keeps its own: also those that are joined in one native tensor."""
    save_tiny(tmp_path / "hf", "mixtral", torch.bfloat16)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = hf_tensors(tmp_path / "hf")
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to(TYPES[number % 3])
    save_file(tensors, file)
    save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=QUIET)
    save_hf(load_native(tmp_path / "native"), tmp_path / "back", checks=QUIET)
    assert_bit_equal(hf_tensors(tmp_path / "back"), tensors)


def test_shards_of_five_megabytes(tmp_path: Path) -> None:
    """A model of 15 MB, sharded by transformers and by us."""
    changes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1000, "num_local_experts": 8, "head_dim": 32}
    model = tiny_model("mixtral", **changes)
    model.save_pretrained(tmp_path / "hf", max_shard_size="5MB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) >= 4
    save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=QUIET)
    save_hf(load_native(tmp_path / "native"), tmp_path / "back", max_shard=5_000_000, checks=QUIET)
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) >= 3 and all(shard.stat().st_size < 5_100_000 for shard in shards)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_bit_equal(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))
    torch.testing.assert_close(
        hf_logits(load_pretrained(tmp_path / "back"), prompts()), hf_logits(model, prompts()), rtol=0, atol=0
    )


def test_what_comes_along(tmp_path: Path) -> None:
    """Tokenizer and generation_config.json are carried through; without them, token ids still are."""
    save_tiny(tmp_path / "hf", "qwen3_moe", bos_token_id=5, eos_token_id=[6, 7])
    small = {"tokenizer.json": '{"x": 1}', "tokenizer_config.json": "{}", "generation_config.json": '{"top_k": 3}'}
    for name, text in small.items():
        (tmp_path / "hf" / name).write_text(text)
    (tmp_path / "hf" / "README.md").write_text("not copied")
    save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=QUIET)
    config = json.loads((tmp_path / "native/release/config.json").read_text())
    assert config["config"]["data"]["tokenizer_model"] == str(tmp_path / "native/release/hf")
    assert set(config["config"]) == {"model", "moe", "data"}
    save_hf(load_native(tmp_path / "native"), tmp_path / "back", checks=QUIET)
    assert {name: (tmp_path / "back" / name).read_text() for name in small} == small
    assert not (tmp_path / "back" / "README.md").exists()
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == [6, 7]

    for name in small:
        (tmp_path / "hf" / name).unlink()
    source = load_hf(tmp_path / "hf")
    save_hf(source, tmp_path / "bare", checks=QUIET)
    assert json.loads((tmp_path / "bare/generation_config.json").read_text())["eos_token_id"] == [6, 7]
    save_hf(with_reference(source, tmp_path / "back"), tmp_path / "referenced", checks=QUIET)
    assert (tmp_path / "referenced/generation_config.json").read_text() == small["generation_config.json"]


def test_cast(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf", "olmoe")
    save_hf(CastSource(load_hf(tmp_path / "hf"), torch.bfloat16), tmp_path / "bf16", checks=QUIET)
    expected = {name: value.bfloat16() for name, value in hf_tensors(tmp_path / "hf").items()}
    assert_bit_equal(hf_tensors(tmp_path / "bf16"), expected)
    load_pretrained(tmp_path / "bf16", torch.bfloat16)


def test_padding_of_the_vocabulary_is_zero(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf", "llama")
    weight = native_tensors(load_hf(tmp_path / "hf"))["output_layer.weight"]
    assert weight.shape == (128, 32) and not weight[VOCAB:].any() and weight[:VOCAB].any(dim=1).all()


def test_verification_notices_a_changed_copy(tmp_path: Path) -> None:
    """The checks are not for show: another model of the same shape is told apart, by checksum and by logits."""
    save_tiny(tmp_path / "hf", "mixtral")
    save_tiny(tmp_path / "other", "mixtral", seed=1)
    with pytest.raises(CheckpointError, match=r"are different models: largest difference of logits [1-9]"):
        save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=Checks(logits_with=tmp_path / "other"))
    assert not (tmp_path / "native").exists()
    save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=QUIET)
    digests = dict.fromkeys(load_native(tmp_path / "native").tensors, "0")
    with pytest.raises(CheckpointError, match=r"embedding.word_embeddings.weight differs from what was read"):
        verify_copy(digests, load_native(tmp_path / "native"))
    digests["gone"] = "0"
    with pytest.raises(CheckpointError, match="gone was not written"):
        verify_copy(digests, load_native(tmp_path / "native"))


def test_multipliers_are_folded(tmp_path: Path) -> None:
    """Granite scales embeddings, attention, residuals and logits; here weights are, and a tied output is untied."""
    factors = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    }
    said: list[str] = []
    for tied in (False, True):
        folder = tmp_path / str(tied)
        save_tiny(folder / "hf", "granitemoe", tie_word_embeddings=tied, **factors)
        checks = Checks(logits_with=folder / "hf", say=said.append)
        save_native(load_hf(folder / "hf"), folder / "native", checks=checks)
        save_hf(load_native(folder / "native"), folder / "back", checks=QUIET)
        before, after = (hf_logits(load_pretrained(folder / name), prompts()) for name in ("hf", "back"))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert sum("agree" in line for line in said) == 2


def test_groups_of_experts(tmp_path: Path) -> None:
    """A group's score is the sum of two experts' in transformers, and of topk / groups experts' here: the same for these."""
    settings = {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    save_tiny(tmp_path / "hf", "glm4_moe", **settings)
    said: list[str] = []
    source = load_hf(tmp_path / "hf")
    assert source.cfg.moe.moe_router_num_groups == 4 and source.cfg.model.rotary_percent == 0.5
    save_native(source, tmp_path / "native", checks=Checks(logits_with=tmp_path / "hf", say=said.append))
    assert any("agree" in line for line in said)
    save_tiny(tmp_path / "other", "glm4_moe", **{**settings, "topk_group": 3})
    with pytest.raises(CheckpointError, match=r"topk_group \(3\) must be half of num_experts_per_tok \(4\)"):
        load_hf(tmp_path / "other")
