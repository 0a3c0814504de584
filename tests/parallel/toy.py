"""A small model with every kind of parameter: tied vocabulary, norm, column/row parallel, gated, biases, experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.parallel.collectives import all_gather_sequence, reduce_scatter_sequence
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.data_parallel import accumulate
from megatron_lsh.parallel.parameters import Init, initialize_parameters, local, parameter
from megatron_lsh.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
)

VOCAB, HIDDEN, WIDE, EXPERTS, SEQUENCE = 32, 8, 16, 4, 8
NORMAL = Init("normal", std=0.3)


class ToyExperts(nn.Module):
    """Token t of the global batch goes to expert token_id % EXPERTS; exchange by all-gather."""

    expert_fsdp_unit = True

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        self.up = parameter((EXPERTS, HIDDEN, WIDE), ctx, init=NORMAL, cut={"ep": 0})
        self.down = parameter((EXPERTS, WIDE, HIDDEN), ctx, init=NORMAL, cut={"ep": 0})

    def forward(self, x_TD: Tensor, expert_T: Tensor) -> Tensor:
        x = all_gather_sequence(x_TD, self.ctx.ep)
        expert = all_gather_sequence(expert_T, self.ctx.ep)
        up, down = local(self.up), local(self.down)
        out = torch.zeros_like(x)
        for i in range(up.shape[0]):
            mine = (expert == self.ctx.ep.rank * up.shape[0] + i).to(x.dtype).unsqueeze(-1)
            out = out + mine * (F.gelu(x @ up[i]) @ down[i])
        return reduce_scatter_sequence(out, self.ctx.ep)


class ToyLayer(nn.Module):
    fsdp_unit = True

    def __init__(self, ctx: ParallelContext, moe: bool) -> None:
        super().__init__()
        self.ctx = ctx
        self.norm = parameter((HIDDEN,), ctx, init=Init("ones"))
        self.fc1 = ColumnParallelLinear(HIDDEN, WIDE, ctx, init=NORMAL, gated=True)
        self.fc2 = RowParallelLinear(WIDE, HIDDEN, ctx, init=NORMAL)
        self.experts = ToyExperts(ctx) if moe else None

    def forward(self, x_SBD: Tensor, expert_SB: Tensor) -> Tensor:
        norm = local(self.norm, partial_grad=self.ctx.sequence_parallel)
        h = self.fc1(F.rms_norm(x_SBD, (HIDDEN,)) * norm)
        x_SBD = x_SBD + self.fc2(F.silu(h[..., 0, :]) * h[..., 1, :])
        if self.experts is not None:
            rows = self.experts(x_SBD.flatten(0, 1), expert_SB.flatten())
            x_SBD = x_SBD + rows.view_as(x_SBD)
        return x_SBD


class ToyModel(nn.Module):
    def __init__(self, ctx: ParallelContext, moe: bool = True) -> None:
        super().__init__()
        self.ctx = ctx
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, ctx, init=NORMAL)
        self.layers = nn.ModuleList(ToyLayer(ctx, moe) for _ in range(2))

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_SBD = self.embedding(tokens_BS)
        expert_SB = tokens_BS.t() % EXPERTS
        if self.ctx.sequence_parallel:
            expert_SB = expert_SB.chunk(self.ctx.tp.size)[self.ctx.tp.rank].contiguous()
        for layer in self.layers:
            x_SBD = layer(x_SBD, expert_SB)
        logits = vocab_parallel_logits(x_SBD, self.embedding.weight, self.ctx)
        return vocab_parallel_cross_entropy(logits, labels_BS.t(), self.ctx.tp).mean()


def config(tp: int = 1, ep: int = 1, shard: bool = False, sequence_parallel: bool = False) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        use_distributed_optimizer=shard,
        sequence_parallel=sequence_parallel,
        distributed_timeout_minutes=1.0,
        device="cpu",
    )


def build(ctx: ParallelContext, moe: bool = True) -> ToyModel:
    model = ToyModel(ctx, moe)
    initialize_parameters(model, seed=7)
    return model


def reference(moe: bool = True) -> ToyModel:
    """The same model on one rank, without torch.distributed."""
    return build(offline_context(device="cpu"), moe)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Global batch of 24 sequences."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (24, SEQUENCE + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def backward(model: ToyModel, ctx: ParallelContext, step: int, micro_batches: int = 2) -> Tensor:
    """Forward and backward of this rank's share of the global batch; returns the mean loss of this rank."""
    tokens, labels = (x.chunk(ctx.dp.size)[ctx.dp.rank] for x in batch(step))
    total = torch.zeros(())
    for i, (t, y) in enumerate(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True)):
        accumulate(model, last=i == micro_batches - 1)
        loss = model(t, y) / micro_batches
        loss.backward()
        total += loss.detach()
    return total
