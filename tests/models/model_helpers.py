"""Small models for the tests of this folder."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lsh.config.config import Config
from megatron_lsh.families import GPT
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext, offline_context

VOCAB = 64
C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=nn.Module)


def make_config(**settings: Any) -> Config:
    """A GPT's config of 2 layers, D = 32, 4 heads, no dropout; `settings` are fields of any of its parts."""
    return fill(Config(), **settings)


def fill(cfg: C, **settings: Any) -> C:
    """The same for the config of any family."""
    small = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "micro_batch_size": 2,
    }
    for name, value in {**small, **settings}.items():
        part = next(part for part in vars(cfg).values() if hasattr(part, name))
        setattr(part, name, value)
    return cfg


LLAMA_LIKE = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
}
MOE = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_layer_freq": "([0]*1+[1]*1)",
    "moe_aux_loss_coeff": 1e-2,
    "moe_z_loss_coeff": 1e-3,
}


def make_gpt(cfg: Config, ctx: ParallelContext | None = None, vocab_size: int = VOCAB) -> GPTModel:
    ctx = ctx or offline_context(device="cpu")
    model = GPT.build(cfg, vocab_size, ctx, MoETelemetry(ctx.device))
    assert isinstance(model, GPTModel)
    return model


def make_batch(batch: int = 2, length: int = 16, vocab_size: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and labels, [B, S] each."""
    tokens = torch.randint(vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, gathered over tensor- and expert-parallel ranks."""
    grads = {}
    for name, param in model.named_parameters():
        assert param.grad is not None, f"{name} has no gradient"
        grad = param.grad
        grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()
    return grads


def randomize(model: M, scale: float = 0.2) -> M:
    """Larger weights and non-trivial norms and biases, so that no term hides behind a zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator) * scale
            param.copy_(param + noise if param.dim() == 1 else noise)
    return model


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Separate projections, heads first -> [q..q, k, v] per query group."""
    return torch.cat([x.unflatten(0, (groups, -1)) for x in (q, k, v)], dim=1).flatten(0, 1)


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set every parameter of `model`, and no others."""
    state = model.state_dict()
    assert set(state) == set(weights)
    for name, value in weights.items():
        assert state[name].shape == value.shape, name
    model.load_state_dict(weights)


def shake(model: nn.Module) -> None:
    """Norms and biases away from one and zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
