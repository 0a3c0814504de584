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
from megatron_lsh.moe.memo import ReplayMemo
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
        residual_ND: row minus centroid, in the rows' dtype; None with ``--lsh-residual none``.
    """

    clusters: lsh.Clusters
    residual_ND: Tensor | None


class LSHCompressor(nn.Module):
    """Sends one centroid per cluster of near-duplicate rows (``docs/lsh.md``)."""

    rotation_DQW: Tensor

    def __init__(self, cfg: LSHConfig, hidden: int, layer: int, telemetry: MoETelemetry, device: torch.device) -> None:
        """
        Args:
            cfg: hashes, width, residual and seed.
            hidden: D.
            layer: number of the MoE layer; each layer has its own rotations.
            telemetry: receives ``lsh_*`` gauges.
        """
        super().__init__()
        self._cfg = cfg
        self._layer = layer
        self._telemetry = telemetry
        rotation = lsh.make_rotation(
            hidden, cfg.lsh_num_hashes, cfg.lsh_hash_width, seed=cfg.lsh_seed, stream=layer, device=device
        )
        # Not saved: it is a pure function of the configuration, which every checkpoint carries.
        self.register_buffer("rotation_DQW", rotation, persistent=False)

    def compress(self, rows_ND: Tensor, counts_E: Tensor, memo: ReplayMemo | None) -> tuple[Tensor, Tensor, LSHState]:
        memo = memo or ReplayMemo()
        clusters = memo.recall((self._layer, "clusters"), lambda: self._cluster(rows_ND, counts_E))
        centroids_CD, residual_ND = lsh.compress(rows_ND, clusters, with_residual=self._cfg.lsh_residual == "identity")
        if not memo.replaying((self._layer, "lsh")):
            self._record(rows_ND.detach(), centroids_CD.detach(), clusters)
        return centroids_CD, clusters.counts_E, LSHState(clusters, residual_ND)

    def restore(self, wire_CD: Tensor, state: LSHState) -> Tensor:
        return lsh.restore(wire_CD, state.residual_ND, state.clusters)

    def _cluster(self, rows_ND: Tensor, counts_E: Tensor) -> lsh.Clusters:
        codes_NQ = lsh.hash_rows(rows_ND, self.rotation_DQW, self._cfg.lsh_num_hashes)
        return lsh.cluster_by_code(codes_NQ, counts_E, num_codes=2 * self._cfg.lsh_hash_width)

    def _record(self, rows_ND: Tensor, centroids_CD: Tensor, clusters: lsh.Clusters) -> None:
        missed, total = lsh.residual_energy(rows_ND, centroids_CD, clusters)
        self._telemetry.add(self._layer, "lsh_rows", clusters.num_rows)
        self._telemetry.add(self._layer, "lsh_clusters", clusters.num_clusters)
        self._telemetry.add(self._layer, "lsh_residual_energy", missed)
        self._telemetry.add(self._layer, "lsh_row_energy", total)
