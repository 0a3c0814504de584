"""Dense to mixture of experts: the first logits are the dense model's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from megatron_lsh.config import MoEConfig, parse_args, validate
from megatron_lsh.convert import (
    load_hf,
    load_model,
    load_native,
    save_hf,
    save_native,
    upcycle,
)
from megatron_lsh.convert.logits import our_logits
from megatron_lsh.errors import CheckpointError, ConfigError
from megatron_lsh.families import GPT
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.main import configure
from megatron_lsh.training.startup import refuse_to_overwrite
from megatron_lsh.training.train import train as run
from tests.convert.helpers import QUIET, native_tensors
from tests.convert.tiny import hf_logits, load_pretrained, prompts, save_tiny
from tests.models.model_helpers import make_config, make_gpt, randomize

PRESERVING: list[tuple[dict[str, Any], int]] = [
    ({"num_experts": 4}, 1),
    ({"num_experts": 8, "moe_router_topk": 4}, 2),
    ({"num_experts": 6, "moe_router_topk": 3}, 3),
    ({"num_experts": 8, "moe_router_topk": 8}, 4),
    ({"num_experts": 4, "moe_layer_freq": "[0,1]"}, 2),
    ({"num_experts": 4, "moe_router_score_function": "sigmoid"}, 2),
    ({"num_experts": 4, "moe_router_topk_scaling_factor": 2.5}, 1),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_first_logits_equal_the_dense_models(family: str, tmp_path: Path) -> None:
    expected = hf_logits(save_tiny(tmp_path, family), prompts())
    dense = load_hf(tmp_path)
    for settings, granularity in PRESERVING:
        model = upcycle(dense, MoEConfig(**settings), granularity)
        assert not model.notices
        torch.testing.assert_close(our_logits(model, prompts()), expected, rtol=0, atol=2e-5)
        assert model.cfg.moe.moe_ffn_hidden_size == 48 // granularity


@torch.no_grad()
def test_gelu_and_biases(tmp_path: Path) -> None:
    """What Hugging Face's families do not have, from a native checkpoint."""
    from megatron_lsh.checkpoint import CheckpointManager, TrainingState
    from megatron_lsh.config import to_dict
    from megatron_lsh.config.checkpoint import CheckpointConfig

    cfg = make_config()
    model = randomize(make_gpt(cfg)).eval()
    manager = CheckpointManager(
        CheckpointConfig(save=str(tmp_path)), offline_context(device="cpu"), notify=lambda text: None
    )
    rows = {"embedding.word_embeddings.weight": 64}
    manager.save(TrainingState(model, config=to_dict(cfg)["config"], progress={"iteration": 3}, padded_rows=rows))
    dense = load_native(tmp_path, 3)
    tokens = prompts() % 64
    torch.testing.assert_close(load_model(dense)(tokens)[..., :64], model(tokens), rtol=0, atol=1e-6)
    for scaling in (None, 2.0):
        moe = upcycle(dense, MoEConfig(num_experts=4, moe_router_topk_scaling_factor=scaling), 2)
        torch.testing.assert_close(our_logits(moe, tokens), model(tokens), rtol=0, atol=5e-5)


def test_routers_are_random_and_those_of_a_fresh_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    source = upcycle(load_hf(tmp_path), MoEConfig(num_experts=4), seed=7)
    tensors = native_tensors(source)
    cfg = source.cfg
    cfg.training.seed = 7
    fresh = GPT.build(cfg, 128, offline_context(device="cpu"), MoETelemetry(torch.device("cpu")))
    for layer in range(2):
        name = f"decoder.layers.{layer}.mlp.router.weight"
        assert torch.equal(tensors[name], fresh.state_dict()[name])
    granular = native_tensors(upcycle(load_hf(tmp_path), MoEConfig(num_experts=4), 2, seed=7))
    router = granular["decoder.layers.0.mlp.router.weight"]
    assert (
        torch.equal(router[0], router[1])
        and torch.equal(router[2], router[3])
        and not torch.equal(router[0], router[2])
    )


def test_export_and_notices(tmp_path: Path) -> None:
    """A Llama becomes a Mixtral, a Qwen3 a Qwen3-MoE; other scores are announced as another function."""
    for family, expected in (("llama", "mixtral"), ("qwen3", "qwen3_moe")):
        dense = save_tiny(tmp_path / family, family, eos_token_id=9)
        save_hf(upcycle(load_hf(tmp_path / family), MoEConfig(num_experts=4)), tmp_path / expected, checks=QUIET)
        model = load_pretrained(tmp_path / expected)
        assert model.config.model_type == expected and model.config.eos_token_id == 9
        torch.testing.assert_close(hf_logits(model, prompts()), hf_logits(dense, prompts()), rtol=0, atol=2e-5)
    other = upcycle(load_hf(tmp_path / "llama"), MoEConfig(num_experts=4, moe_router_pre_softmax=True))
    assert "do not add up to one" in other.notices[0]


@pytest.mark.parametrize(
    ("settings", "granularity", "message"),
    [
        ({}, 1, "give --num-experts"),
        ({"num_experts": 4, "moe_shared_expert_intermediate_size": 8}, 1, "neither a shared expert"),
        ({"num_experts": 4}, 5, r"width of the dense layer \(48\) must be divisible .*granularity \(5\)"),
        ({"num_experts": 6}, 4, r"--num-experts \(6\) must be divisible"),
        ({"num_experts": 8, "moe_router_topk": 2}, 4, r"--moe-router-topk \(2\) must be divisible"),
        ({"num_experts": 8, "moe_ffn_hidden_size": 48}, 2, r"--moe-ffn-hidden-size \(48\) must be 24"),
        ({"num_experts": 8, "moe_layer_freq": "[0,0]"}, 1, r"makes no layer a mixture"),
        ({"num_experts": 8}, 0, r"--moe-upcycling-granularity \(0\) must be at least 1"),
        ({"num_experts": 4, "moe_router_topk": 1}, 1, r"upcycled, cannot be trained here: moe.moe_router_topk \(1\)"),
        ({"num_experts": 4, "moe_router_topk": 8}, 1, r"moe_router_topk \(8\) must be at most moe.num_experts"),
        ({"num_experts": 4, "moe_router_group_topk": 2}, 1, r"moe_router_num_groups \(absent\) must be given"),
    ],
)
def test_refused(settings: dict[str, Any], granularity: int, message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=message):
        upcycle(load_hf(tmp_path), MoEConfig(**settings), granularity)


def test_only_dense_models_are_upcycled(tmp_path: Path) -> None:
    save_tiny(tmp_path, "mixtral")
    with pytest.raises(CheckpointError, match="already has 4 experts"):
        upcycle(load_hf(tmp_path), MoEConfig(num_experts=8))


FLAGS = [
    *("--num-experts", "8", "--moe-router-topk", "4", "--moe-ffn-hidden-size", "24", "--moe-upcycling-granularity", "2"),
    *("--moe-use-upcycling", "--micro-batch-size", "1", "--lr", "0", "--lr-decay-iters", "9", "--train-iters", "2"),
    *("--mock-data", "--vocab-size", "66", "--seq-length", "16", "--eval-iters", "1", "--log-interval", "1"),
    *("--num-workers", "0", "--device", "cpu", "--weight-decay", "0"),
    *("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"),
]  # fmt: skip


def train(flags: list[str]) -> int:
    """A run of the entry script's parts on this rank."""
    return run(*configure(GPT.parse(flags))).iteration


def test_training_starts_from_a_dense_checkpoint(tmp_path: Path) -> None:
    """Megatron-LM's flags, at TP 2 x EP 2; the learning rate is zero, so the weights stay what upcycling made of them."""
    expected = hf_logits(save_tiny(tmp_path / "hf", "llama", max_position_embeddings=16), prompts())
    save_native(load_hf(tmp_path / "hf"), tmp_path / "dense", checks=QUIET)
    flags = ["--config", str(tmp_path / "dense/release/config.json"), *FLAGS]
    start = [*flags, "--load", str(tmp_path / "dense"), "--save", str(tmp_path / "run")]
    assert run_distributed_test(train, 2, start) == [2, 2]
    for iteration in (None, 2):
        model = load_native(tmp_path / "run/release" if iteration is None else tmp_path / "run", iteration)
        torch.testing.assert_close(our_logits(model, prompts()), expected, rtol=0, atol=2e-5)
    with pytest.raises(ConfigError, match="already holds a run"):
        refuse_to_overwrite(validate(GPT.parse(start), 2).checkpoint)
    # The same command line starts and resumes, if --load and --save are one folder.
    own = [*flags, "--pretrained-checkpoint", str(tmp_path / "dense"), "--load", str(tmp_path / "run")]
    again = [*own, "--save", str(tmp_path / "run"), "--train-iters", "3"]
    shutil.rmtree(tmp_path / "run/release")
    assert run_distributed_test(train, 2, again) == [3, 3]
    assert not (tmp_path / "run/release").exists()


def test_flags() -> None:
    base = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", *FLAGS]
    with pytest.raises(ConfigError, match=r"checkpoint.save \(absent\) must be given"):
        validate(parse_args([*base, "--load", "dense"]), 2)
    with pytest.raises(
        ConfigError, match=r"moe_use_upcycling \(True\) must be off without a dense checkpoint: give --load"
    ):
        validate(parse_args([*base, "--save", "/tmp"]), 2)
    with pytest.raises(ConfigError, match=r"num_experts \(8\) must be divisible by .*granularity \(3\)"):
        validate(parse_args([*base, "--save", "/tmp", "--load", "d", "--moe-upcycling-granularity", "3"]), 2)
