"""LSH on tokens instead of rows: nothing of size [N, D] is ever written.

For means and the residuals that need no row by itself (``--lsh-residual identity`` and ``none``): rows are hashed, summed
and restored through their tokens' numbers, and the restored rows exist only in registers on their way into each token's
weighted sum. Values and gradients are those of :class:`LSHCompressor`, which does the work for rows of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_lsh import lsh
from megatron_lsh.lsh import Clusters
from megatron_lsh.moe.compressors.lsh import Cluster, LSHCompressor, Represent, RestoreRows
from megatron_lsh.moe.dispatcher import Restore
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.permute import Permutation, Rows


@dataclass(frozen=True)
class RestoredTokens(Rows):
    """Outputs that are restored on their way into the tokens' sums. ``source_MD`` holds what came back, [C, D].

    Attributes:
        clusters: which rows each cluster stands for.
        x_TD: the tokens; None where neither value nor gradient needs them.
        sent_CD: the means; None where the value does not need them.
        cluster_of_slot_TK: int64, the cluster of each choice of each token; -1 where it has no row.
        p: for the time.
    """

    clusters: Clusters | None = None
    x_TD: Tensor | None = None
    sent_CD: Tensor | None = None
    cluster_of_slot_TK: Tensor | None = None
    p: LayerPass | None = None

    def materialise(self) -> Tensor:
        """The rows after all; without gradient to the tokens (a probe looks at them)."""
        assert self.clusters is not None and self.permutation is not None
        residual_ND = None
        if self.sent_CD is not None and self.x_TD is not None:
            residual_ND = self.x_TD[self.permutation.token_of_row_N] - self.sent_CD[self.clusters.cluster_N]
        return lsh.restore(self.source_MD, residual_ND, self.clusters)

    def combine(self, probs_TK: Tensor) -> Tensor:
        assert self.p is not None
        return self.p.time("lsh_restore_time_ms", self._combine, self.source_MD, probs_TK)

    def _combine(self, out_CD: Tensor, probs_TK: Tensor) -> Tensor:
        permutation, clusters, slots_TK = self.permutation, self.clusters, self.cluster_of_slot_TK
        assert permutation is not None and clusters is not None and slots_TK is not None
        return lsh.restore_tokens(
            out_CD,
            probs_TK,
            self.x_TD,
            self.sent_CD,
            permutation.token_of_row_N,
            permutation.row_of_TK,
            clusters,
            slots_TK,
        )


class TokenLSHCompressor(LSHCompressor):
    """See the module's docstring."""

    def __init__(
        self,
        cluster: Cluster,
        represent: Represent,
        restore: RestoreRows,
        sent_rows: Callable[[Tensor], Tensor | None],
        *,
        adds_residual: bool,
        keeps_tokens: bool,
    ) -> None:
        """
        Args:
            adds_residual: x - c is added to E(c).
            keeps_tokens: the gradient of x - c reaches the tokens, added or not.
        """
        super().__init__(cluster, represent, restore, sent_rows)
        self._adds_residual, self._keeps_tokens = adds_residual, keeps_tokens

    def compress(self, rows: Rows, p: LayerPass) -> tuple[Tensor, Tensor, Callable[[], Restore]]:
        permutation, x_TD, index_N = rows.permutation, rows.source_MD, rows.index_N
        if permutation is None or index_N is None:
            return super().compress(rows, p)
        if not p.replay:
            p.decided[self] = self.cluster(x_TD.detach(), index_N, rows.counts_E, p)
        clusters: Clusters = p.decided[self]
        means_CD, slots_TK = p.time("lsh_compress_time_ms", _means, x_TD, permutation, clusters)
        if not p.replay:
            self.record(clusters, p, *lsh.residual_energy(x_TD.detach(), means_CD.detach(), clusters, index_N))

        def restore(out_CD: Tensor) -> Rows:
            return RestoredTokens(
                out_CD, rows.counts_E, permutation, None, clusters,
                x_TD if self._keeps_tokens else None, means_CD.detach() if self._adds_residual else None, slots_TK, p,
            )  # fmt: skip

        return means_CD, clusters.counts_E, lambda: restore


def _means(x_TD: Tensor, permutation: Permutation, clusters: Clusters) -> tuple[Tensor, Tensor]:
    slots_TK = lsh.clusters_of_slots(clusters, permutation.row_of_TK)
    return lsh.compress_tokens(x_TD, permutation.token_of_row_N, clusters, slots_TK), slots_TK
