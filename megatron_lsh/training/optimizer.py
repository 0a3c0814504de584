"""Builds the optimizer: AdamW, Muon or SGD on (sharded) parameters, in groups with and without weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megatron_lsh.config.training import OptimizerConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.training.apex_adam import ApexAdamW
from megatron_lsh.training.muon import Muon, MuonRule

VOCABULARY = ("word_embeddings.weight", "output_layer.weight")  # ends of names


def parameter_groups(model: nn.Module, decoupled: bool = False, muon: bool = False) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay: none for biases, norms, other 1-D parameters, and those made without.

    ``"decay"`` in a group says whether it decays, ``"vocabulary"`` whether it holds the word embeddings and the output
    layer if `decoupled` (--decoupled-lr); the schedule reads both. ``"muon"`` says whether, with `muon`, a group is of
    matrices of hidden layers. Groups are split once more by the device mesh
    of their parameters, because a fused update runs over a list of DTensors of one mesh. Per-expert biases ([E, F])
    are 2-D and recognised by their name. Empty groups are left out.
    """
    groups: dict[tuple[bool, bool, bool, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias") and getattr(parameter, "decays", True)
        vocabulary = decoupled and name.endswith(VOCABULARY)
        mesh = str(parameter.device_mesh) if isinstance(parameter, DTensor) else ""
        hidden = muon and getattr(parameter, "matrices", None) is not None
        kind = {"decay": decay, "vocabulary": vocabulary} | ({"muon": hidden} if muon else {})
        group = groups.setdefault((decay, vocabulary, hidden, mesh), {"params": [], **kind})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, cfg: OptimizerConfig, bf16: bool = False) -> Optimizer:
    """The optimizer of `cfg` over all parameters of `model`; learning rate and weight decay come from the schedule.

    `bf16`: the dtype in which Muon multiplies matrices, fp32 otherwise.

    Raises:
        ConfigError: apex was asked for and NVIDIA's is not there.
    """
    groups = parameter_groups(model, decoupled=cfg.decoupled_lr is not None, muon=cfg.optimizer == "muon")
    lr = cfg.lr or 0.0
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if cfg.use_apex_adam:
        if cfg.optimizer != "adam":
            raise ConfigError(
                f"optimizer.optimizer ({cfg.optimizer}) must be adam with --use-apex-adam: drop one of them"
            )
        return ApexAdamW(groups, lr=lr, betas=betas, eps=cfg.adam_eps)
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=cfg.sgd_momentum)
    if cfg.optimizer == "muon":
        rule = MuonRule(
            momentum=cfg.muon_momentum,
            nesterov=cfg.muon_nesterov,
            scale_mode=cfg.muon_scale_mode,
            extra_scale_factor=cfg.muon_extra_scale_factor,
            steps=cfg.muon_num_ns_steps,
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        return Muon(groups, rule, lr=lr, betas=betas, eps=cfg.adam_eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=cfg.adam_eps, fused=True)
