"""A small trainer with everything a checkpoint must hold: all kinds of parameters, dropout, a schedule, buffers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lsh.checkpoint import CheckpointManager, LoadResult, TrainingState
from megatron_lsh.checkpoint.lock import LOCK
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.parallel import PrecisionConfig
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import clip_grad_norm, finalize_gradients, shard_model
from megatron_lsh.parallel.parameters import initialize_parameters, local, parameter
from megatron_lsh.parallel.random import get_rng_state, seed_everything, set_rng_state
from tests.parallel.toy import NORMAL, ToyModel, backward, batch

COLUMN, ODD = 12, 5


class Model(ToyModel):
    """The toy of tests/parallel with what is awkward to shard: a TP-split vector and a size that does not divide."""

    def __init__(self, ctx: ParallelContext, column: int = COLUMN) -> None:
        super().__init__(ctx)
        self.column = parameter((column,), ctx, init=NORMAL, cut={"tp": 0})
        self.odd = parameter((ODD, 3), ctx, init=NORMAL)
        self.register_buffer("expert_bias", torch.zeros(4))

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        column = local(self.column)
        noise = torch.nn.functional.dropout(torch.ones_like(column))  # makes the result depend on the random state
        penalty = (column * noise).square().sum() + local(self.odd).square().sum()
        return super().forward(tokens_BS, labels_BS) + 0.01 * penalty


class Schedule:
    """Linear decay; counts its own steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self, steps: int = 1) -> None:
        self.steps += steps
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - self.steps / 100)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.step(0)


class Trainer:
    """Model, optimizer and schedule of one run on one rank."""

    def __init__(self, ctx: ParallelContext, seed: int = 5, **model_args: Any) -> None:
        self.ctx = ctx
        self.model: nn.Module = Model(ctx, **model_args)
        initialize_parameters(self.model, seed)
        if ctx.dense_mesh is not None:
            shard_model(self.model, ctx, PrecisionConfig())
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
        self.schedule = Schedule(self.optimizer)
        self.iteration = 0
        seed_everything(seed, ctx)

    def train(self, until: int) -> list[float]:
        """Iterate up to `until`; the loss of each iteration on this rank."""
        losses = []
        while self.iteration < until:
            if self.ctx.dense_mesh is None:
                loss = self._backward_on_one_rank()
            else:
                loss = backward(self.model, self.ctx, self.iteration)  # type: ignore[arg-type]
                finalize_gradients(self.model, self.ctx)
                clip_grad_norm(self.model, 1.0, self.ctx)
            self.schedule.step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.expert_bias += 0.1  # type: ignore[operator]
            self.iteration += 1
            losses.append(loss.item())
        return losses

    def _backward_on_one_rank(self) -> Tensor:
        loss = self.model(*batch(self.iteration))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return loss.detach()

    def state(self, **changes: Any) -> TrainingState:
        fields: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "progress": {"iteration": self.iteration, "consumed_samples": self.iteration * 8},
            "config": {"model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}, "lsh": {"lsh_seed": 3}},
            "rng": get_rng_state(),
            "extra": {"data_fingerprint": "abc"},
        }
        return TrainingState(**(fields | changes))

    def resume(self, manager: CheckpointManager, **changes: Any) -> LoadResult | None:
        result = manager.load(self.state(**changes))
        if result is not None:
            self.iteration = result.iteration
            if result.rng is not None:
                set_rng_state(result.rng)
        return result

    def values(self) -> dict[str, Tensor]:
        """All tensors of model and optimizer, whole."""
        values = {name: whole(value) for name, value in self.model.state_dict().items()}
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                values[f"{name}.{key}"] = whole(value)
        return values

    def digest(self) -> str:
        """Equal for two trainers only if every value is bit-equal."""
        digest = hashlib.sha256()
        for name, value in sorted(self.values().items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
        digest.update(
            repr([{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]).encode()
        )
        digest.update(torch.get_rng_state().numpy().tobytes())
        return digest.hexdigest()


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def manager(ctx: ParallelContext, root: Path, **settings: Any) -> CheckpointManager:
    """A manager that saves to and loads from `root` and keeps what it says."""
    said: list[str] = []
    cfg = CheckpointConfig(**({"save": str(root), "load": str(root)} | settings))
    result = CheckpointManager(cfg, ctx, notify=said.append)
    result.said = said  # type: ignore[attr-defined]
    return result


def saved_names(root: Path) -> list[str]:
    """What is in a save folder, but for the lock of the run that saves there."""
    return sorted(path.name for path in root.iterdir() if path.name != LOCK)
