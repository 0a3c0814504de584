"""Muon: against a plain implementation, against torch's, over ranks and through checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lsh.config import Config
from megatron_lsh.families import GPT
from megatron_lsh.models.shape import ModelShape
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.parameters import ONE_MATRIX, initialize_parameters
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.muon import MuonRule, orthogonalize
from megatron_lsh.training.optimizer import build_optimizer
from megatron_lsh.training.run import set_up
from megatron_lsh.training.soundness import standing
from tests.models.families import make_t5, t5_config
from tests.training.helpers import tiny_config

MUON = "--optimizer muon --muon-momentum 0.9 --muon-extra-scale-factor 0.2 --lr 1e-2 --weight-decay 0.1"
SHARED = (
    "--num-query-groups 2 --group-query-attention --moe-shared-expert-intermediate-size 24 --moe-layer-freq ([0]+[1])"
)


def plain(matrix: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
    """One step on one matrix in fp64, momentum 0.9, spectral scale times 0.2, lr 1e-2, weight decay 0.1."""
    momentum += 0.1 * (gradient - momentum)
    x = momentum / momentum.norm()
    for _ in range(5):
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        else:
            gram = x.T @ x
            x = 3.4445 * x - 4.7750 * x @ gram + 2.0315 * x @ gram @ gram
    return (1 - 1e-2 * 0.1) * matrix - 1e-2 * 0.2 * math.sqrt(max(matrix.shape)) * x


def matrices_of(name: str, weight: Tensor, cfg: Config) -> list[Tensor] | None:
    """Views of the matrices that a weight of a hidden layer is made of; None for what is AdamW's."""
    heads, groups, size = 4, 2, cfg.model.hidden_size // 4  # type: ignore[operator]
    if name.endswith("linear_qkv.weight"):
        rows = torch.arange(len(weight)).view(groups, heads // groups + 2, size)
        kinds = rows[:, :-2], rows[:, -2], rows[:, -1]
        return [weight[kind.flatten()] for kind in kinds]
    if "experts.linear_fc1" in name and "shared" not in name:
        return [half for expert in weight for half in expert.chunk(2)]
    if "linear_fc" in name and weight.ndim == 3:  # experts' second matrices; gate and up of dense layers
        return list(weight)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return [weight]
    return None


def put_back(name: str, weight: Tensor, parts: list[Tensor], cfg: Config) -> Tensor:
    """The inverse of `matrices_of`."""
    if name.endswith("linear_qkv.weight"):
        q, k, v = (part.view(2, -1, cfg.model.hidden_size // 4, weight.shape[-1]) for part in parts)  # type: ignore[operator]
        return torch.cat([q, k, v], dim=1).reshape(weight.shape)
    return torch.cat(parts).view(weight.shape)


def test_three_steps_are_those_of_a_plain_loop_over_matrices_and_of_adamw_for_the_rest() -> None:
    cfg = tiny_config(f"{MUON} {SHARED} --untie-embeddings-and-output-weights")
    device = torch.device("cpu")
    model = GPT.build(cfg, 64, offline_context(device=device), MoETelemetry(device))
    initialize_parameters(model, 1)
    optimizer = build_optimizer(model, cfg.optimizer)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 if group["decay"] else 0.0
    start = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    expected = {name: matrices_of(name, weight, cfg) for name, weight in start.items()}
    momenta = {name: [torch.zeros_like(m) for m in parts] for name, parts in expected.items() if parts is not None}
    rest = {name: torch.nn.Parameter(start[name].float()) for name, parts in expected.items() if parts is None}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in momenta} == {
        *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    }
    assert any("router" in name for name in rest) and "output_layer.weight" in rest and len(momenta) == 10
    matrices, vectors = ([p for p in rest.values() if (p.ndim > 1) is decays] for decays in (True, False))
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    for step in range(3):
        for number, (name, p) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            p.grad = torch.randn(p.shape, generator=generator)
            if name in rest:
                rest[name].grad = p.grad.clone()
            else:
                parts, gradients = expected[name], matrices_of(name, p.grad.double(), cfg)
                assert parts is not None and gradients is not None
                expected[name] = [plain(m, u, g) for m, u, g in zip(parts, momenta[name], gradients, strict=True)]
        optimizer.step()
        adam.step()
    for name, p in model.named_parameters():
        parts = expected[name]
        wanted = rest[name] if parts is None else put_back(name, start[name], parts, cfg).float()
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_it_is_torchs_muon_on_a_matrix(shape: tuple[int, int]) -> None:
    """torch multiplies in bf16, too, and scales by 0.2 times the root of the larger side; bf16 keeps 8 bits."""
    torch.manual_seed(0)
    start, rule = torch.randn(shape), MuonRule(0.95, True, "spectral", 0.2, 5, torch.bfloat16)
    theirs, momentum = torch.nn.Parameter(start.clone()), torch.zeros(shape)
    optimizer = torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ours = start.clone()
    for _ in range(3):
        theirs.grad = torch.randn(shape)
        momentum.lerp_(theirs.grad, 0.05)
        ours -= rule.update(theirs.grad.lerp(momentum, 0.95), ONE_MATRIX)
        optimizer.step()
    error = (ours - theirs).norm() / (theirs - start).norm()
    assert error < 0.05, error


def test_updates_are_orthogonal_and_those_of_nothing_are_nothing() -> None:
    stack = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    assert ((orthogonalize(stack) * (u @ v)).sum((1, 2)) / 20 > 0.75).all(), "near the orthogonal factor"
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    assert orthogonalize(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    scales = {
        mode: MuonRule(scale_mode=mode).update(stack, ONE_MATRIX).norm() for mode in ("spectral", "unit_rms_norm")
    }
    assert scales["spectral"] / scales["unit_rms_norm"] == pytest.approx(50**0.5 / (20 / 50) ** 0.5)


def test_keys_and_values_of_cross_attention_are_matrices_of_their_own() -> None:
    cfg = t5_config()
    model = make_t5(cfg)
    found = {name: p.matrices for name, p in model.named_parameters() if getattr(p, "matrices", None) is not None}
    kv = next(matrices for name, matrices in found.items() if name.endswith("linear_kv.weight"))
    shape = ModelShape.from_config(cfg.model)
    assert (kv.widths, kv.groups) == ((shape.head_dim, shape.head_dim), shape.query_groups)
    assert kv.groups > 1 and all("embedding" not in name for name in found)


LAYOUTS = {
    "EP 2, sharded": "--expert-model-parallel-size 2 --use-distributed-optimizer",
    "TP 2, EP 2": "--tensor-model-parallel-size 2 --expert-model-parallel-size 2",
    "DP 2, sharded": "--use-distributed-optimizer",
}
RUN = f"{MUON} {SHARED} --train-iters 4 --eval-iters 0"


def losses(flags: str, world_size: int) -> list[float]:
    """Of each iteration from where the run starts to the fourth; with --save a checkpoint is made after the second."""
    cfg = tiny_config(f"{RUN} {flags}", world_size)
    run = set_up(cfg, GPT, initialize(cfg.parallel, moe=True))
    found = []
    with run.batches("train", run.state.consumed_samples) as batches:
        while run.state.iteration < 4:
            result = run.step(batches, run.state.iteration, False)
            run.state.advance(result, 8)
            found.append(result.loss)
            if run.state.iteration == 2 and cfg.checkpoint.save is not None:
                run.checkpoints.save(run.checkpoint_state(), standing(run.state))
                run.checkpoints.wait()
    return found


def on_two_ranks(folder: str) -> dict[str, list[float]]:
    """The first layout saves, each rank a part of the momentum; what one rank saved is taken up by two."""
    saving = {"EP 2, sharded": f" --save {folder}/two"}
    found = {name: losses(flags + saving.get(name, ""), 2) for name, flags in LAYOUTS.items()}
    found["bf16"] = losses(f"{LAYOUTS['EP 2, sharded']} --bf16", 2)
    found["resumed"] = losses(f"{LAYOUTS['TP 2, EP 2']} --load {folder}/one", 2)
    return found


@pytest.mark.slow
def test_every_layout_trains_alike_and_goes_on_from_the_others_checkpoints(tmp_path: Path) -> None:
    alone, half = losses(f"--save {tmp_path}/one", 1), losses("--bf16", 1)
    assert len(alone) == 4 and alone[-1] < alone[0] - 0.3
    found = run_distributed_test(on_two_ranks, 2, str(tmp_path))
    assert found[0] == found[1], "ranks disagree"
    for layout in LAYOUTS:
        assert found[0][layout] == pytest.approx(alone, rel=1e-5), layout
    assert found[0]["bf16"] == pytest.approx(half, rel=2e-3) and half == pytest.approx(alone, rel=2e-2)
    assert found[0]["resumed"] == pytest.approx(alone[2:], rel=1e-5)
    assert losses(f"--load {tmp_path}/two", 1) == pytest.approx(alone[2:], rel=1e-5)
    torch.distributed.destroy_process_group()
