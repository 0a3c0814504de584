"""Checkpoints written before a parameter existed: it starts as what computes the same function, and that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lsh.checkpoint import CheckpointManager, TrainingState
from megatron_lsh.config import Config, to_dict
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.errors import CheckpointError
from megatron_lsh.families import GPT
from megatron_lsh.models.model import Model
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context

VOCAB = 32
CTX = offline_context(device="cpu")


def settings() -> Config:
    """GPT-2's kind of model, with experts: linear layers have biases."""
    cfg = Config()
    model, moe = cfg.model, cfg.moe
    model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads = 2, 16, 32, 2
    model.seq_length = model.max_position_embeddings = 8
    model.hidden_dropout = model.attention_dropout = 0.0
    moe.num_experts, moe.moe_ffn_hidden_size = 4, 24
    return cfg


class Run:
    def __init__(self, seed: int, folder: Path, router_biases: tuple[bool, ...] = (True, True)) -> None:
        """`router_biases`: whether each layer's router has the bias that routers of former versions had not."""
        cfg = settings()
        cfg.training.seed = seed
        self.model: Model = GPT.build(cfg, VOCAB, CTX, MoETelemetry(CTX.device))
        for layer, kept in enumerate(router_biases):
            if not kept:
                self.router(layer).bias = None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        self.state = TrainingState(
            model=self.model, optimizer=self.optimizer, config=to_dict(cfg)["config"], progress={"iteration": 1}
        )
        self.said: list[str] = []
        places = CheckpointConfig(load=str(folder), save=str(folder), save_rng=False, load_rng=False)
        self.manager = CheckpointManager(places, CTX, notify=self.said.append)

    def router(self, layer: int) -> torch.nn.Module:
        return self.model.get_submodule(f"decoder.layers.{layer}.mlp.router")

    def step(self) -> Tensor:
        """One step; returns the logits before it."""
        tokens_BS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
        logits: Tensor = self.model(tokens_BS[:, :-1])
        loss_BS, aux_loss = self.model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        (loss_BS.mean() + aux_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return logits.detach()


def test_a_router_without_bias_is_one_with_a_bias_of_zero(tmp_path: Path) -> None:
    old = Run(1, tmp_path, router_biases=(False, False))
    old.step()
    old.manager.save(old.state)
    new = Run(2, tmp_path)
    assert new.router(0).bias.any()
    loaded = new.manager.load(new.state)
    assert loaded is not None and loaded.optimizer_loaded and loaded.iteration == 1
    (said,) = [line for line in new.said if "router.bias" in line and "were" not in line and "optimizer" not in line]
    assert "written before models had decoder.layers.0.mlp.router.bias; decoder.layers.1.mlp.router.bias" in said
    assert "start at zero" in said and not new.router(0).bias.any() and not new.router(1).bias.any()
    assert torch.equal(new.step(), old.step())
    assert new.router(0).bias.any(), "it learns"


def test_a_checkpoint_that_lacks_one_of_several_is_still_refused(tmp_path: Path) -> None:
    some = Run(1, tmp_path, router_biases=(True, False))
    some.step()
    some.manager.save(some.state)
    new = Run(2, tmp_path)
    with pytest.raises(CheckpointError, match=r"decoder.layers.1.mlp.router.bias is not in the checkpoint"):
        new.manager.load(new.state)
