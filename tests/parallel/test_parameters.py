"""Shards have the right shape, and initial values do not depend on the layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_lsh.config.parallel import PrecisionConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.data_parallel import num_local_parameters, num_parameters, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import Init, initialize_parameters, is_expert, local, parameter
from megatron_lsh.parallel.testing import run_distributed_test
from tests.parallel.toy import ToyModel, build, config, reference

NORMAL = Init("normal", std=0.5)


class Bag(nn.Module):
    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, param in parameters.items():
            setattr(self, name, param)


def test_offline_parameters_are_plain_shards() -> None:
    ctx = offline_context(ParallelLayout(8, tp=2, ep=4), rank=3)
    dense, rep = parameter((6, 4), ctx, init=NORMAL, cut={"tp": 0}), parameter((6,), ctx, init=NORMAL)
    expert = parameter((8, 6, 4), ctx, init=NORMAL, cut={"ep": 0})
    assert (dense.shape, rep.shape, expert.shape) == ((3, 4), (6,), (2, 6, 4))
    assert dense.is_meta and dense.init_spec == NORMAL and is_expert(expert) and not is_expert(dense)
    bag = Bag(dense=dense, rep=rep, expert=expert)
    initialize_parameters(bag, 0)  # nothing to fill on meta
    assert num_parameters(bag) == 24 + 6 + 192
    assert num_local_parameters(bag) == 12 + 6 + 48
    assert local(dense) is dense


def test_every_kind_of_init() -> None:
    ctx = offline_context(device="cpu")
    bag = Bag(
        zeros=parameter((3,), ctx, init=Init("zeros")),
        ones=parameter((3,), ctx, init=Init("ones")),
        normal=parameter((200, 200), ctx, init=NORMAL),
        experts=parameter((2, 200, 100), ctx, init=NORMAL, cut={"ep": 0}),
    )
    initialize_parameters(bag, 0)
    assert bag.zeros.tolist() == [0.0] * 3 and bag.ones.tolist() == [1.0] * 3
    for param in (bag.normal, bag.experts):
        assert abs(param.mean().item()) < 0.01 and abs(param.std().item() - 0.5) < 0.01
    assert not torch.equal(bag.experts[0], bag.experts[1])
    with pytest.raises(ValueError, match="must be normal"):
        Init("uniform")


def test_values_depend_on_seed_and_name_only() -> None:
    ctx = offline_context(device="cpu")

    def draw(seed: int, **others: nn.Parameter) -> torch.Tensor:
        bag = Bag(**others, weight=parameter((4, 4), ctx, init=NORMAL))
        torch.manual_seed(torch.seed())  # the global generator has no say
        initialize_parameters(bag, seed)
        return bag.weight.detach()

    assert torch.equal(draw(1), draw(1, first=parameter((7,), ctx, init=NORMAL)))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    ("layout", "rank"), [((4, 1, 1), 2), ((4, 1, 4), 3), ((4, 2, 2), 1), ((8, 2, 4), 6), ((4, 4, 1), 3)]
)
def test_each_layout_starts_from_the_same_weights(layout: tuple[int, int, int], rank: int) -> None:
    ctx = offline_context(ParallelLayout(*layout), rank, "cpu")
    split = {"embedding.weight": 0, "fc1.weight": 1, "fc1.bias": 1, "fc2.weight": 1}
    for (name, shard), full in zip(build(ctx).named_parameters(), reference().parameters(), strict=True):
        dim = next((dim for suffix, dim in split.items() if name.endswith(suffix)), None)
        if is_expert(shard):
            full = full.chunk(ctx.ep.size)[ctx.ep.rank]
        elif dim is not None:
            full = full.chunk(ctx.tp.size, dim)[ctx.tp.rank]
        assert torch.equal(shard, full), name


def sharded_parameters() -> None:
    ctx = initialize(config(tp=2, ep=4))
    model = ToyModel(ctx)
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        mesh_dim, placement = param.device_mesh.mesh_dim_names, param.placements[0]
        if is_expert(param):
            assert mesh_dim == ("ep",) and placement == Shard(0), name
        elif "norm" in name or name.endswith("fc2.bias"):
            assert mesh_dim == ("tp",) and placement == Replicate(), name
        else:
            assert mesh_dim == ("tp",) and isinstance(placement, Shard), name
        assert param.shape == param.global_shape and param.to_local().is_contiguous()
    initialize_parameters(model, 7)
    for param, want in zip(model.parameters(), reference().parameters(), strict=True):
        assert torch.equal(param.full_tensor(), want)
    cuts = [param.cut for param in model.parameters()]
    assert {"ep": 0} in cuts and {"tp": 1} in cuts and {} in cuts
    shard_model(model, ctx, PrecisionConfig())
    assert [param.cut for param in model.parameters()] == cuts  # notes survive
    with pytest.raises(ValueError, match="before shard_model"):
        initialize_parameters(model, 7)


def test_parameters_of_four_ranks_are_dtensors() -> None:
    run_distributed_test(sharded_parameters, 4)


def test_mistakes() -> None:
    ctx = offline_context(ParallelLayout(4, tp=4, ep=4))
    with pytest.raises(ConfigError, match=r"num_experts \(6\) must be divisible by .*expert_model_parallel_size \(4\)"):
        parameter((6, 4), ctx, init=NORMAL, cut={"ep": 0})
    with pytest.raises(ConfigError, match=r"\(6\) must be divisible by parallel.tensor_model_parallel_size \(4\)"):
        parameter((6, 4), ctx, init=NORMAL, cut={"tp": 0})
    for cut in ({"ep": 0, "tp": 1}, {"ep": 1}, {"etp": 1}, {"dp": 0}):
        with pytest.raises(ValueError, match="must be"):
            parameter((8, 4), ctx, init=NORMAL, cut=cut)
    with pytest.raises(ValueError, match=r"weight has no init_spec"):
        initialize_parameters(nn.Linear(2, 2), 0)
