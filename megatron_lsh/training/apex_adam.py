"""NVIDIA apex's FusedAdam behind torch's optimizer interface, for parameters that are DTensors.

apex knows neither DTensors nor distributed checkpoints. Here it updates the local shards, which share their memory with
the DTensors, while the state that checkpoints see consists of DTensors under the names torch's AdamW uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megatron_lsh.errors import ConfigError


class ApexAdamW(Optimizer):
    """AdamW whose arithmetic is done by ``apex.optimizers.FusedAdam``.

    Raises:
        ConfigError: NVIDIA's apex is not installed.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.01,
    ) -> None:
        self._fused_adam = _apex_fused_adam()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. A closure is not supported."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and _local(p).numel() > 0]
            if not parameters:
                continue
            shards = [nn.Parameter(_local(p), requires_grad=True) for p in parameters]
            inner = self._fused_adam(
                shards, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                adam_w_mode=True,
            )  # fmt: skip
            for parameter, shard in zip(parameters, shards, strict=True):
                state = self._state_of(parameter)
                shard.grad = _local(parameter.grad)
                inner.state[shard] = {name: _local(state[name]) for name in ("exp_avg", "exp_avg_sq")}
                state["step"] += 1
            inner.param_groups[0]["step"] = int(self.state[parameters[0]]["step"]) - 1  # apex counts it up in step()
            inner.step()

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _apex_fused_adam() -> Any:
    """``apex.optimizers.FusedAdam`` of NVIDIA's apex. PyPI's package of the same name is another project."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            "--use-apex-adam needs NVIDIA's apex, built from https://github.com/NVIDIA/apex (the package called apex on "
            f"PyPI is another project): {error}. Without the flag torch's fused AdamW is used, which needs nothing"
        ) from error
    return FusedAdam
