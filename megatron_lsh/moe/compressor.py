"""Compressors: what travels in place of the routed rows.

A compressor is the pluggable half of a token dispatcher that changes the payload; the other half, the exchange
(``exchange.py``), moves it. Hashes and clusters are recorded in the :class:`ReplayMemo`, so activation recomputation never
hashes again, and the backward pass reuses the forward's clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_lsh import lsh
from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.low_rank import LowRankResidual
from megatron_lsh.moe.memo import ReplayMemo
from megatron_lsh.moe.permute import Permutation
from megatron_lsh.moe.telemetry import MoETelemetry


class Compressor(Protocol):
    """Shrinks the rows of each expert before the exchange and restores them after it."""

    def compress(self, rows_ND: Tensor, counts_E: Tensor, memo: ReplayMemo | None) -> tuple[Tensor, Tensor, Any]:
        """Rows sorted by expert, int64 rows per expert -> (wire rows [C, D] sorted by expert, counts [E], state)."""
        ...

    def restore(self, wire_CD: Tensor, state: Any) -> Tensor:
        """The experts' outputs for the wire rows, in their order -> one output per original row, [N, D]."""
        ...


class NoCompressor:
    """Every row travels as it is."""

    def compress(self, rows_ND: Tensor, counts_E: Tensor, memo: ReplayMemo | None) -> tuple[Tensor, Tensor, None]:
        return rows_ND, counts_E, None

    def restore(self, wire_CD: Tensor, state: None) -> Tensor:
        return wire_CD


@dataclass(frozen=True)
class LSHState:
    """What stays at home between compress and restore.

    Attributes:
        clusters: which rows each centroid stands for.
        counts_E: int64, rows per expert before compression.
        residual_ND: row minus centroid, in the rows' dtype; None where neither value nor gradient needs it.
        points: the rows, what was sent for them, and which rows that is if it is rows (int64 [C]), where outputs are
            interpolated between what was sent.
    """

    clusters: lsh.Clusters
    counts_E: Tensor
    residual_ND: Tensor | None
    points: tuple[Tensor, Tensor, Tensor | None] | None = None


@dataclass(frozen=True)
class LSHTokenState:
    """What stays at home between compress_tokens and restore_tokens.

    Attributes:
        clusters: which rows each centroid stands for.
        permutation: which rows the tokens have.
        cluster_of_slot_TK: int64, the cluster of each choice of each token; -1 where it has no row.
        x_TD: the tokens; None where neither value nor gradient needs them.
        centroids_CD: None where the value does not need them.
    """

    clusters: lsh.Clusters
    permutation: Permutation
    cluster_of_slot_TK: Tensor
    x_TD: Tensor | None
    centroids_CD: Tensor | None


class LSHCompressor(nn.Module):
    """Sends one centroid per cluster of near-duplicate rows (``docs/lsh.md``)."""

    rotation_DQW: Tensor

    def __init__(
        self,
        cfg: LSHConfig,
        hidden: int,
        layer: int,
        telemetry: MoETelemetry,
        device: torch.device,
        low_rank: LowRankResidual | None = None,
    ) -> None:
        """
        Args:
            cfg: clustering, hashes, residual, gradient and seed.
            hidden: D.
            layer: number of the MoE layer; each layer has its own rotations.
            telemetry: receives ``lsh_*`` gauges.
            low_rank: the learned map of ``--lsh-residual lowrank``.
        """
        super().__init__()
        self._cfg = cfg
        self._layer = layer
        self._telemetry = telemetry
        self._num_hashes, self._width = cfg.hash_shape()
        self._keeps_residual = cfg.lsh_residual in ("identity", "lowrank") or cfg.lsh_gradient == "straight-through"
        self._interpolates, self._sends_members = cfg.lsh_residual == "interpolate", cfg.sends_members()
        self.low_rank = low_rank
        rotation = lsh.make_rotation(
            hidden, self._num_hashes, self._width, seed=cfg.lsh_seed, stream=layer, device=device
        )
        # Not saved: it is a pure function of the configuration, which every checkpoint carries.
        self.register_buffer("rotation_DQW", rotation, persistent=False)

    def compress(self, rows_ND: Tensor, counts_E: Tensor, memo: ReplayMemo | None) -> tuple[Tensor, Tensor, LSHState]:
        memo = memo or ReplayMemo()
        clusters = memo.recall((self._layer, "clusters"), lambda: self._cluster(rows_ND.detach(), None, counts_E))
        with self._telemetry.timed(self._layer, "lsh_compress_time_ms") as region:
            rows_ND, member_C = region.enter(rows_ND), None
            if self._sends_members:
                member_C = memo.recall((self._layer, "members"), lambda: lsh.nearest_members(rows_ND, clusters))
                centroids_CD, residual_ND = lsh.compress_to_members(
                    rows_ND, clusters, member_C, with_residual=self._keeps_residual
                )
            else:
                centroids_CD, residual_ND = lsh.compress(rows_ND, clusters, with_residual=self._keeps_residual)
            points = (rows_ND, centroids_CD, member_C) if self._interpolates else None
            centroids_CD = region.leave(centroids_CD)
        if not memo.replaying((self._layer, "lsh")):
            self._record(rows_ND.detach(), None, centroids_CD.detach(), clusters)
        return centroids_CD, clusters.counts_E, LSHState(clusters, counts_E, residual_ND, points)

    def restore(self, wire_CD: Tensor, state: LSHState) -> Tensor:
        with self._telemetry.timed(self._layer, "lsh_restore_time_ms") as region:
            return region.leave(self._restore(region.enter(wire_CD), state))

    def _restore(self, wire_CD: Tensor, state: LSHState) -> Tensor:
        if state.points is not None:
            rows_ND, centroids_CD, member_C = state.points
            block = self._cfg.lsh_interpolation_block
            return lsh.interpolate(wire_CD, rows_ND, centroids_CD, state.clusters, member_C, block=block)
        if self._cfg.lsh_residual == "none":
            rows_ND = lsh.restore(wire_CD, None, state.clusters)
            return rows_ND if state.residual_ND is None else lsh.straight_through(rows_ND, state.residual_ND)
        rows_ND = lsh.restore(wire_CD, state.residual_ND, state.clusters)
        if self.low_rank is not None:
            assert state.residual_ND is not None
            rows_ND = rows_ND + self.low_rank(state.residual_ND, state.counts_E)
        return rows_ND

    def reads_tokens(self, x_TD: Tensor, probs_TK: Tensor) -> bool:
        """Whether :meth:`compress_tokens` can take the place of permute and compress."""
        on_rows = self.low_rank is not None or self._interpolates or self._sends_members
        return not on_rows

    def compress_tokens(
        self, x_TD: Tensor, permutation: Permutation, memo: ReplayMemo | None
    ) -> tuple[Tensor, Tensor, LSHTokenState]:
        """:meth:`compress` of the permuted tokens, without permuting them: (wire rows [C, D], counts [E], state)."""
        memo = memo or ReplayMemo()
        index_N, counts_E = permutation.token_of_row_N, permutation.counts_E
        clusters = memo.recall((self._layer, "clusters"), lambda: self._cluster(x_TD.detach(), index_N, counts_E))
        with self._telemetry.timed(self._layer, "lsh_compress_time_ms") as region:
            x_TD = region.enter(x_TD)
            cluster_of_slot_TK = lsh.clusters_of_slots(clusters, permutation.row_of_TK)
            centroids_CD = lsh.compress_tokens(x_TD, index_N, clusters, cluster_of_slot_TK)
            centroids_CD = region.leave(centroids_CD)
        if not memo.replaying((self._layer, "lsh")):
            self._record(x_TD.detach(), index_N, centroids_CD.detach(), clusters)
        kept_CD = centroids_CD.detach() if self._cfg.lsh_residual != "none" else None
        state = LSHTokenState(
            clusters, permutation, cluster_of_slot_TK, x_TD if self._keeps_residual else None, kept_CD
        )
        return centroids_CD, clusters.counts_E, state

    def restore_tokens(self, wire_CD: Tensor, probs_TK: Tensor, state: LSHTokenState) -> Tensor:
        """:meth:`restore` and the weighted sum over each token's rows in one: [T, D]."""
        p = state.permutation
        with self._telemetry.timed(self._layer, "lsh_restore_time_ms") as region:
            y_TD = lsh.restore_tokens(
                region.enter(wire_CD), probs_TK, state.x_TD, state.centroids_CD, p.token_of_row_N, p.row_of_TK,
                state.clusters, state.cluster_of_slot_TK,
            )  # fmt: skip
            return region.leave(y_TD)

    def _cluster(self, rows_ND: Tensor, index_N: Tensor | None, counts_E: Tensor) -> lsh.Clusters:
        """Clusters of the rows, or of ``rows_ND[index_N]``."""
        cfg, timed = self._cfg, self._telemetry.timed
        with timed(self._layer, "lsh_hash_time_ms"):
            projection_NP = lsh.project(rows_ND, self.rotation_DQW)
        if cfg.lsh_clustering == "bucket":
            with timed(self._layer, "lsh_cluster_time_ms"):
                codes_NQ = lsh.codes_of(projection_NP, self._num_hashes)
                codes_NQ = codes_NQ if index_N is None else codes_NQ[index_N]
                return lsh.cluster_by_code(codes_NQ, counts_E, num_codes=2 * self._width)
        with timed(self._layer, "lsh_cluster_time_ms"):
            budgets_E = lsh.row_budgets(counts_E, cfg.lsh_target_rate)
            clusters = lsh.cluster_projection(
                projection_NP, counts_E, budgets_E, int(budgets_E.sum()), self._num_hashes, index_N
            )
        with timed(self._layer, "lsh_refine_time_ms"):
            return lsh.refine(rows_ND, clusters, counts_E, cfg.lsh_refine_steps, index_N)

    def _record(self, rows_ND: Tensor, index_N: Tensor | None, centroids_CD: Tensor, clusters: lsh.Clusters) -> None:
        if self._sends_members:
            missed = (rows_ND - centroids_CD.index_select(0, clusters.cluster_N)).float().square().sum()
            total = rows_ND.float().square().sum()
        else:
            missed, total = lsh.residual_energy(rows_ND, centroids_CD, clusters, index_N)
        self._telemetry.add(self._layer, "lsh_rows", clusters.num_rows)
        self._telemetry.add(self._layer, "lsh_clusters", clusters.num_clusters)
        self._telemetry.add(self._layer, "lsh_residual_energy", missed)
        self._telemetry.add(self._layer, "lsh_row_energy", total)
