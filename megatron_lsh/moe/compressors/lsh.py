"""LSH: one row is sent for each cluster of similar rows, and every row's output is restored from its cluster's.

A compressor is put together from three functions, so that a variant is one new function:

    cluster(rows_ND, index_N, counts_E, p) -> Clusters     which rows travel together (index_N: row n is rows[index_N[n]])
    represent(rows_ND, clusters, p) -> Sent                 what is sent for each of them
    restore(rows_ND, sent, clusters, counts_E) -> f        prepares what needs no output; f(out_CD) -> rows_ND does the rest

Those of this file are described in docs/lsh.md. What is discrete is recorded, so that activation recomputation never hashes
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_lsh import lsh
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.lsh import Clusters, Members
from megatron_lsh.moe.compressors.low_rank import LowRankResidual
from megatron_lsh.moe.dispatcher import Restore
from megatron_lsh.moe.gauges import Gauge, averaged, ratio
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.permute import Rows
from megatron_lsh.moe.rates import FollowedRate
from megatron_lsh.ops import to_device

#: The parts of LSH that are timed apart.
STAGES = ("hash", "cluster", "refine", "compress", "restore")

_MEANINGS = ("hashing", "clustering by hashes", "refining clusters", "making what is sent, forward and backward",
             "restoring outputs, forward and backward")  # fmt: skip

GAUGES = (
    Gauge("lsh_compression_rate", "share", "rows sent, share", ratio("lsh_clusters", "lsh_rows"),
          "rows sent per row", layers="mean", optional=True),
    Gauge("lsh_residual_energy", "share", "residual energy |x-c|²/|x|²", ratio("lsh_residual_energy", "lsh_row_energy"),
          "sum of (x - c)² over sum of x²: how unlike the merged rows were", layers="mean", optional=True),
    Gauge("lsh_time_ms", "ms", "LSH, ms per step", averaged(*(f"lsh_{stage}_time_ms" for stage in STAGES)),
          "LSH in all its stages", optional=True),
    *(Gauge(f"lsh_{stage}_time_ms", "ms", f"LSH: {stage}", averaged(f"lsh_{stage}_time_ms"), meaning, optional=True)
      for stage, meaning in zip(STAGES, _MEANINGS, strict=True)),
)  # fmt: skip


class Sent(NamedTuple):
    """What stands for the rows of each cluster.

    Attributes:
        rows_CD: what travels.
        residual_ND: rows minus what is sent for them, in the rows' dtype; None where nobody asks for it.
        member_C: int64, which rows were sent, if they are rows.
        energy: sums of |x - c|^2 and of |x|^2 over the rows x, c what is sent for x; None for means, from
            which it follows.
    """

    rows_CD: Tensor
    residual_ND: Tensor | None
    member_C: Tensor | None = None
    energy: tuple[Tensor, Tensor] | None = None


Cluster = Callable[[Tensor, "Tensor | None", Tensor, LayerPass], Clusters]
Represent = Callable[[Tensor, Clusters, LayerPass], Sent]
RestoreRows = Callable[[Tensor, Sent, Clusters, Tensor], Callable[[Tensor], Tensor]]


class LSHCompressor(nn.Module):
    """Clusters, what stands for them, and restored outputs; see the module's docstring."""

    gauges = GAUGES

    def __init__(
        self,
        cluster: Cluster,
        represent: Represent,
        restore: RestoreRows,
        sent_rows: Callable[[Tensor], Tensor | None] = lambda counts_E: None,
    ) -> None:
        """``sent_rows``: the number of clusters per expert, where it follows from the rows per expert."""
        super().__init__()
        self.cluster, self.represent, self.restore, self.sent_rows = cluster, represent, restore, sent_rows

    def compress(self, rows: Rows, p: LayerPass) -> tuple[Tensor, Tensor, Callable[[], Restore]]:
        rows_ND = rows.materialise()
        if not p.replay:
            # Tokens where rows are copies of them: each is projected once.
            source, index_N = (rows_ND, None) if rows.index_N is None else (rows.source_MD, rows.index_N)
            p.decided[self] = self.cluster(source.detach(), index_N, rows.counts_E, p)
        clusters: Clusters = p.decided[self]
        sent = p.time("lsh_compress_time_ms", self.represent, rows_ND, clusters, p)
        if not p.replay:
            self.record(
                clusters, p, *(sent.energy or lsh.residual_energy(rows_ND.detach(), sent.rows_CD.detach(), clusters))
            )

        def prepare() -> Restore:
            finish = p.time("lsh_restore_time_ms", lambda: self.restore(rows_ND, sent, clusters, rows.counts_E))
            return lambda out_CD: rows.outputs(p.time("lsh_restore_time_ms", finish, out_CD))

        return sent.rows_CD, clusters.counts_E, prepare

    def record(self, clusters: Clusters, p: LayerPass, missed: Tensor, total: Tensor) -> None:
        """Count rows and clusters, and the energy that the clusters miss of the rows' total."""
        p.add(
            lsh_rows=clusters.num_rows, lsh_clusters=clusters.num_clusters, lsh_residual_energy=missed,
            lsh_row_energy=total,
        )  # fmt: skip
        followed: FollowedRate | None = getattr(self.cluster, "followed", None)
        if followed is not None and self.training:
            followed.see(clusters.num_rows, missed, total)


class ClusterByHash(nn.Module):
    """Cross-polytope hashes; then as many clusters as the budget allows, or one per distinct code."""

    rotation_DQW: Tensor

    def __init__(self, cfg: LSHConfig, rotation_DQW: Tensor, layer: int = 0) -> None:
        """
        Args:
            rotation_DQW: fp32 [D, Q W], of ``lsh.make_rotation``; each layer has its own.
            layer: its number in the model, which may have a rate of its own.
        """
        super().__init__()
        self._cfg, self._layer, self._rates = cfg, layer, cfg.rates()
        self.followed = None if self._rates.energy is None else FollowedRate(layer, self._rates.at(layer, 0))
        self.set_iteration(0)
        self._num_hashes, self._width = cfg.hash_shape()
        # Not saved: it is a pure function of the configuration, which every checkpoint carries.
        self.register_buffer("rotation_DQW", rotation_DQW, persistent=False)

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        most = self._rates.at(self._layer, iteration)
        self._rate = most if self.followed is None else min(self.followed.rate, most)

    def forward(self, rows_ND: Tensor, index_N: Tensor | None, counts_E: Tensor, p: LayerPass) -> Clusters:
        projection_NP = p.time("lsh_hash_time_ms", lsh.project, rows_ND, self.rotation_DQW)
        agreed = None if p.agreed is None else p.agreed()
        if self._cfg.lsh_clustering == "bucket":
            return p.time("lsh_cluster_time_ms", self._buckets, projection_NP, index_N, counts_E)
        sent_E, routed_E = (None, None) if agreed is None else (agreed.sent_E, agreed.routed_E)
        clusters = p.time("lsh_cluster_time_ms", self._budgets, projection_NP, index_N, counts_E, sent_E)
        clusters, steps = clusters.known(sent_E, routed_E), self._cfg.lsh_refine_steps
        return p.time("lsh_refine_time_ms", lsh.refine, rows_ND, clusters, counts_E, steps, index_N)

    def sent_rows(self, counts: Tensor) -> Tensor | None:
        """Clusters per expert, where they follow from the rows per expert."""
        if self._cfg.lsh_clustering == "bucket":
            return None
        return lsh.row_budgets(counts, self._rate)

    def _buckets(self, projection_NP: Tensor, index_N: Tensor | None, counts_E: Tensor) -> Clusters:
        codes_NQ = lsh.codes_of(projection_NP, self._num_hashes)
        codes_NQ = codes_NQ if index_N is None else codes_NQ[index_N]
        return lsh.cluster_by_code(codes_NQ, counts_E, num_codes=2 * self._width)

    def _budgets(
        self, projection_NP: Tensor, index_N: Tensor | None, counts_E: Tensor, sent_E: Sequence[int] | None
    ) -> Clusters:
        if sent_E is None:
            budgets_E = lsh.row_budgets(counts_E, self._rate)
            total = int(budgets_E.sum())
        else:
            budgets_E, total = to_device(torch.tensor(sent_E, dtype=torch.int64), counts_E.device), sum(sent_E)
        return lsh.cluster_projection(projection_NP, counts_E, budgets_E, total, self._num_hashes, index_N)


def send_means(with_residual: bool) -> Represent:
    """``--lsh-representative mean``."""

    def represent(rows_ND: Tensor, clusters: Clusters, p: LayerPass) -> Sent:
        return Sent(*lsh.compress(rows_ND, clusters, with_residual=with_residual))

    return represent


def send_members(with_residual: bool) -> Represent:
    """``--lsh-representative member``: of each cluster the row nearest to its mean."""

    def represent(rows_ND: Tensor, clusters: Clusters, p: LayerPass) -> Sent:
        if not p.replay:
            p.decided[represent] = lsh.measured_members(rows_ND.detach(), clusters)
        found: Members = p.decided[represent]
        sent = lsh.compress_to_members(rows_ND, clusters, found.member_C, with_residual=with_residual)
        return Sent(*sent, found.member_C, (found.missed, found.total))

    return represent


def interpolated(block: int, form: str = "outputs", rank: int | None = None, beyond: int = 0) -> RestoreRows:
    """``--lsh-residual interpolate``: E(c) + f(x) - f(c), with f fitted to all pairs (c, E(c)) of a block.

    ``rank``: the coordinates that f sees, where they are fewer and an expert has more than ``beyond`` representatives
    (lsh/leading.py).
    """

    def restore(rows_ND: Tensor, sent: Sent, clusters: Clusters, counts_E: Tensor) -> Callable[[Tensor], Tensor]:
        given = (rows_ND, sent.rows_CD, clusters, sent.member_C)
        if rank is None or rank >= rows_ND.shape[1] or max(clusters.counts_on_host()) <= beyond:
            chosen = "differences" if lsh.has_tensor_cores(rows_ND) else form
            return lsh.prepare_interpolation(*given, block=block, form=chosen)
        return lsh.prepare_leading(*given, block=block, rank=rank)

    return restore


def as_sent(straight_through: bool) -> RestoreRows:
    """``--lsh-residual none``: E(c). With ``straight_through`` rows get the gradient of a residual that is not added."""

    def restore(rows_ND: Tensor, sent: Sent, clusters: Clusters, counts_E: Tensor) -> Callable[[Tensor], Tensor]:
        def finish(out_CD: Tensor) -> Tensor:
            out_ND = lsh.restore(out_CD, None, clusters)
            if not straight_through:
                return out_ND
            assert sent.residual_ND is not None
            return lsh.straight_through(out_ND, sent.residual_ND)

        return finish

    return restore


class WithResidual(nn.Module):
    """``--lsh-residual identity``: E(c) + x - c, the paper's; ``lowrank``: that plus a learned map of x - c."""

    def __init__(self, low_rank: LowRankResidual | None = None) -> None:
        super().__init__()
        self.low_rank = low_rank

    def forward(self, rows_ND: Tensor, sent: Sent, clusters: Clusters, counts_E: Tensor) -> Callable[[Tensor], Tensor]:
        def finish(out_CD: Tensor) -> Tensor:
            out_ND = lsh.restore(out_CD, sent.residual_ND, clusters)
            if self.low_rank is None:
                return out_ND
            assert sent.residual_ND is not None
            return out_ND + self.low_rank(
                sent.residual_ND, counts_E.tolist() if clusters.rows is None else clusters.rows
            )

        return finish
