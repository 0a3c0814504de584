"""Dispatchers that only benchmarks use, as plug-ins: `--moe-token-dispatcher-type benchmarks.dispatchers:NAME`.

One rank cannot encode what it does not send, and most ideas for better clusters were not worth a flag. Here they are, so
that anyone can measure them again:

    coded, coded_lsh    one rank, with every row encoded and decoded (`--lsh-wire-dtype`) as if it had travelled
    random_seeds        the nearest of random rows in place of hashing, then means: as refinement does
    hadamard            structured rotations: three rounds of random signs and a Hadamard transform (Andoni et al. 2015)
    shared_low_rank     one learned low-rank map for all experts of a layer in place of one each
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.lsh import Clusters, cluster_sizes, expert_of_row, nearest_centroid
from megatron_lsh.moe.compressors.low_rank import LowRankResidual
from megatron_lsh.moe.compressors.lsh import ClusterByHash, WithResidual
from megatron_lsh.moe.dispatcher import Dispatcher
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.registry import DispatcherSpec, lsh_dispatcher, row_dispatcher
from megatron_lsh.moe.transport import LocalTransport, Transport


class CodedTransport(LocalTransport):
    """EP = 1, and every row pays the wire dtype's rounding both ways, forward and backward.

    Of EP ranks each sends only (EP - 1) / EP of its rows, so this is the loss that many ranks would have.
    """

    start, start_back = Transport.start, Transport.start_back


def _coded(spec: DispatcherSpec) -> Transport:
    return CodedTransport(spec.ctx.ep, spec.num_experts, spec.wire())


def coded(spec: DispatcherSpec) -> Dispatcher:
    return row_dispatcher(spec, transport=_coded(spec))


def coded_lsh(spec: DispatcherSpec) -> Dispatcher:
    return lsh_dispatcher(spec, transport=_coded(spec))


def random_seeds(spec: DispatcherSpec) -> Dispatcher:
    """`ceil(rate n)` random rows of each expert as first centroids; no hash."""

    def cluster(rows_ND: Tensor, index_N: Tensor | None, counts_E: Tensor, p: LayerPass) -> Clusters:
        rows_ND = rows_ND if index_N is None else rows_ND[index_N]
        return random_seed_clusters(rows_ND, counts_E, spec.lsh.rates().at(spec.layer, 0))

    return lsh_dispatcher(spec, cluster=cluster)


def random_seed_clusters(rows_ND: Tensor, counts_E: Tensor, rate: float, steps: int = 1) -> Clusters:
    """The nearest of random rows of the same expert, then `steps - 1` rounds of refinement."""
    budgets_E = lsh.row_budgets(counts_E, rate)
    expert_N = expert_of_row(counts_E, rows_ND.shape[0])
    # Sorted by (expert, random number): the first rows of each expert are a sample of it.
    order_N = torch.argsort(expert_N + torch.rand(rows_ND.shape[0], dtype=torch.float64))
    rank_N = torch.arange(rows_ND.shape[0]) - (counts_E.cumsum(0) - counts_E)[expert_N]
    seeds_C = order_N[rank_N < budgets_E[expert_N]]
    nearest_N, _ = nearest_centroid(rows_ND, rows_ND[seeds_C], counts_E.tolist(), budgets_E.tolist())
    nearest_N[seeds_C] = torch.arange(seeds_C.shape[0])  # equal rows must not leave a cluster empty
    clusters = Clusters.from_assignment(nearest_N, cluster_sizes(nearest_N, seeds_C.shape[0]), budgets_E)
    return lsh.refine(rows_ND, clusters, counts_E, steps - 1)


def hadamard_rotation(hidden: int, num_hashes: int, width: int, generator: torch.Generator) -> Tensor:
    """[D, Q * W]: of each hash the first W columns of three rounds of (signs, Hadamard), D padded to a power of 2."""
    size = 1 << max(hidden - 1, width - 1, 1).bit_length()
    transform = torch.ones(1, 1)
    while transform.shape[0] < size:
        transform = torch.cat([torch.cat([transform, transform], 1), torch.cat([transform, -transform], 1)], 0)
    transform = transform / size**0.5
    columns = []
    for _ in range(num_hashes):
        rotation = torch.eye(size)
        for _ in range(3):
            signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
            rotation = rotation * signs @ transform
        columns.append(rotation[:hidden, :width])
    return torch.cat(columns, 1)


def hadamard(spec: DispatcherSpec) -> Dispatcher:
    generator = torch.Generator().manual_seed(spec.lsh.lsh_seed + spec.layer)
    rotation_DQW = hadamard_rotation(spec.hidden, *spec.lsh.hash_shape(), generator).to(spec.ctx.device)
    return lsh_dispatcher(spec, cluster=ClusterByHash(spec.lsh, rotation_DQW, spec.layer))


class _OneMap(LowRankResidual):
    """The same map whatever the expert."""

    def forward(self, residual_ND: Tensor, counts_E: Tensor) -> Tensor:
        return super().forward(residual_ND, counts_E.sum(0, keepdim=True))


def shared_low_rank(spec: DispatcherSpec) -> Dispatcher:
    one = _OneMap(1, spec.hidden, spec.lsh.lsh_residual_rank, spec.ctx)
    return lsh_dispatcher(spec, restore=WithResidual(one))
