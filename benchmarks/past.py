"""LSH that cannot see the future: `--moe-token-dispatcher-type benchmarks.past:past`.

What LSH sends for a token depends on later ones in four ways: which rows form a cluster, which of them stands for it, what
that row is, and the function that is fitted to all representatives' outputs. They close together if the representatives are
rows of the micro-batch before: then they, their outputs and the function are given before the first token of this one is
read, and a token's output follows from its own row alone,

    y = E(c) + f(x) - f(c)       c: the nearest of the earlier rows;  f: fitted to all pairs (c, E(c)) of the expert

The price is that no row is its own representative, and that the representatives were not chosen for these rows. Experts that
choose their tokens (Zhou et al. 2022, arXiv:2202.09368) raise the same question; Wang et al. 2024 (arXiv:2408.15664) show
the leak and let tokens choose again, Raposo et al. 2024 (arXiv:2404.02258) learn a second router that knows only the past,
and Zhong et al. 2024 (Lory, arXiv:2405.03133) merge the experts of a segment by the segment before, the idea used here.

On one rank; the rows of before are not saved in checkpoints: the first micro-batch of a process clusters its own rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.lsh import Clusters, cluster_sizes, nearest_centroid
from megatron_lsh.lsh.interpolate import RIDGE
from megatron_lsh.moe.compressors.lsh import ClusterByHash, Sent
from megatron_lsh.moe.dispatcher import Dispatcher
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.registry import DispatcherSpec, lsh_dispatcher


def past(spec: DispatcherSpec) -> Dispatcher:
    """LSH with exact budgets whose representatives are rows of the micro-batch before."""
    rotation_DQW = lsh.make_rotation(
        spec.hidden, *spec.lsh.hash_shape(), seed=spec.lsh.lsh_seed, stream=spec.layer, device=spec.ctx.device
    )
    book = Past(ClusterByHash(spec.lsh, rotation_DQW, spec.layer))
    return lsh_dispatcher(spec, cluster=book, represent=book.represent, restore=restore)


class Past(torch.nn.Module):
    """Rows of the last micro-batch that was trained on, by expert; none at first."""

    def __init__(self, by_hash: ClusterByHash) -> None:
        super().__init__()
        self._by_hash = by_hash
        self._rows: list[Tensor] = []

    def forward(self, rows_ND: Tensor, index_N: Tensor | None, counts_E: Tensor, p: LayerPass) -> Clusters:
        rows_ND = rows_ND if index_N is None else rows_ND[index_N]
        learns = self.training and torch.is_grad_enabled()
        fresh: list[Tensor] = []
        if learns or not self._rows:
            own = self._by_hash(rows_ND, None, counts_E, p)
            chosen_CD = rows_ND[lsh.nearest_members(rows_ND, own)]
            # An expert without a row keeps what it had; at the very first a row of zeros.
            before = self._rows or [rows_ND.new_zeros(1, rows_ND.shape[1])] * len(counts_E)
            found = chosen_CD.split(own.counts_E.tolist())
            fresh = [new.clone() if len(new) else old for new, old in zip(found, before, strict=True)]
        sent = p.decided["past"] = self._rows or fresh
        counts = [len(rows) for rows in sent]
        nearest_N, _ = nearest_centroid(rows_ND, torch.cat(sent), counts_E.tolist(), counts)
        if learns:
            self._rows = fresh
        sizes_C = cluster_sizes(nearest_N, sum(counts))
        return Clusters.from_assignment(nearest_N, sizes_C, counts_E.new_tensor(counts)).known(counts)

    def represent(self, rows_ND: Tensor, clusters: Clusters, p: LayerPass) -> Sent:
        """What was chosen before."""
        sent_CD = torch.cat(p.decided["past"])
        missed = (rows_ND.detach() - sent_CD[clusters.cluster_N]).float().square().sum()
        return Sent(sent_CD, None, None, (missed, rows_ND.detach().float().square().sum()))


def restore(rows_ND: Tensor, sent: Sent, clusters: Clusters, counts_E: Tensor) -> Callable[[Tensor], Tensor]:
    """The interpolation of lsh/interpolate.py in plain PyTorch, for rows of which none is a representative."""
    rows, counts = counts_E.tolist(), clusters.counts_on_host()
    first = [sum(counts[:expert]) for expert in range(len(counts))]

    def finish(out_CD: Tensor) -> Tensor:
        parts = zip(rows_ND.split(rows), sent.rows_CD.split(counts), out_CD.split(counts),
                    clusters.cluster_N.split(rows), first, strict=True)  # fmt: skip
        return torch.cat([interpolated(x_ND, c_BD, y_BD, own_N - start) for x_ND, c_BD, y_BD, own_N, start in parts])

    return finish


def interpolated(x_ND: Tensor, c_BD: Tensor, y_BD: Tensor, own_N: Tensor) -> Tensor:
    """E(c) + f(x) - f(c) of one expert's rows, each by itself."""
    if len(c_BD) == 1 or len(x_ND) == 0:
        return y_BD[own_N]
    mean_D = c_BD.mean(0)
    c_BD, x_ND = c_BD - mean_D, x_ND - mean_D
    scale = (2 * c_BD.square().sum(1).mean()).clamp(min=1e-20)

    def kernel(a_MD: Tensor) -> Tensor:
        apart_MB = a_MD.square().sum(1, keepdim=True) + c_BD.square().sum(1) - 2 * a_MD @ c_BD.T
        return torch.exp(-apart_MB / scale)

    among_BB = kernel(c_BD)
    system_BB = among_BB + RIDGE * torch.eye(len(c_BD), dtype=c_BD.dtype, device=c_BD.device)
    weights_BD = torch.linalg.solve(system_BB, y_BD - y_BD.mean(0))
    return y_BD[own_N] + (kernel(x_ND) - among_BB[own_N]) @ weights_BD
