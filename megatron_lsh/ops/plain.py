"""Every operation in plain PyTorch: its definition, the reference of its kernel, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lsh.ops import clustering, wire_formats
from megatron_lsh.ops.differences import PlainDifferences
from megatron_lsh.ops.dtypes import accumulator
from megatron_lsh.ops.groups import Groups, Tiles, pick, put


class PlainOps(PlainDifferences):
    """Letters, and what ``index``, ``row_ends``, ``order`` and their like hold, are explained in the package's docstring.

    Sums run in fp32 or better and are rounded once, to the dtype of what was summed. None of them adds with atomics, so a
    result is the same on every run.
    """

    # Which rows form a cluster.

    def project(self, rows: Tensor, rotation: Tensor) -> Tensor:
        """``rows @ rotation`` in the rotation's dtype: [N, P]."""
        return rows.to(rotation.dtype) @ rotation

    def plan(
        self,
        projection: Tensor,
        index: Tensor | None,
        row_ends: Tensor,
        cluster_ends: Tensor,
        num_clusters: int,
        num_hashes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hash the rows of a projection [M, P] and cut each expert's at its budget's weakest links (``lsh/budget.py``).

        Returns:
            int64 cluster [N], order [N], sizes [C] and offsets [C]; clusters are numbered by their first rows.
        """
        projection = projection if index is None else projection.index_select(0, index)
        codes = clustering.codes_of(projection, num_hashes)
        num_codes = 2 * (projection.shape[1] // num_hashes)
        counts, budgets = (clustering.counts_of(ends) for ends in (row_ends, cluster_ends))
        return clustering.cut_at_budgets(codes, projection, counts, budgets, num_clusters, num_codes)

    def nearest(
        self,
        rows: Tensor,
        index: Tensor | None,
        centroids: Tensor,
        row_ends: Tensor,
        cluster_ends: Tensor,
        on_host: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each row among its expert's, the first of equals: int64 [N], and its squared distance [N].

        ``on_host``: rows and centroids per expert, where they are known. Without, this waits for the device; the kernel
        never does.
        """
        rows = rows if index is None else rows.index_select(0, index)
        if on_host is None:
            on_host = clustering.counts_of(row_ends).tolist(), clustering.counts_of(cluster_ends).tolist()
        row_counts, centroid_counts = (list(counts) for counts in on_host)
        return clustering.nearest_centroid(rows, centroids, row_counts, centroid_counts)

    def regroup(
        self, nearest: Tensor, distance: Tensor, row_ends: Tensor, cluster_ends: Tensor, num_clusters: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give the empty clusters of each expert its farthest rows, one each, and put the clusters in order.

        Returns:
            cluster, order, sizes and offsets as :meth:`plan`.
        """
        counts, budgets = (clustering.counts_of(ends) for ends in (row_ends, cluster_ends))
        cluster = clustering.refill_empty(nearest, distance, counts, budgets, num_clusters)
        return clustering.in_order(cluster, clustering.cluster_sizes(cluster, num_clusters))

    # Sums over the rows of a cluster, or over those of a token.

    def segment(
        self,
        source: Tensor,
        index: Tensor | None,
        weight: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        sizes: Tensor,
        mean: bool,
    ) -> Tensor:
        """Sum or mean of each cluster's rows, each times its weight [N] if there is one: [C, D].

        An empty cluster's is zero. A cluster of one row returns that row to the bit.
        """
        if sizes.shape[0] == 0 or order.shape[0] == 0:
            return source.new_zeros(sizes.shape[0], source.shape[1])
        dtype = source.dtype
        if weight is not None:
            rows = source if index is None else source.index_select(0, index)
            source, index = rows.to(accumulator(dtype)) * weight.unsqueeze(1), None
        # embedding_bag is torch's fused gather-and-reduce: it reads each row once, accumulates bf16 in fp32, and its forward
        # is deterministic on GPUs too (a thread walks a bag in order), which index_add is not.
        picked = order if index is None else index.index_select(0, order)
        # Clusters follow one another in the order. What is behind the last belongs to none, and has a bag of its own.
        starts = torch.cat([offsets, offsets[-1:] + sizes[-1:]])
        return F.embedding_bag(picked, source, starts, mode="mean" if mean else "sum")[:-1].to(dtype)

    def segment_residual(self, source: Tensor, order: Tensor, offsets: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each cluster's rows [C, D], and what each row differs from it [N, D]."""
        mean = self.segment(source, None, None, order, offsets, sizes, True)
        return mean, source - mean.index_select(0, clustering.cluster_of_row(order, sizes))

    def members(self, rows: Tensor, order: Tensor, offsets: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Of each cluster the row nearest to its mean, the first of equals, as those of two rows are.

        Returns:
            int64 [C]; and in the dtype of sums [C, 2], the sums of ``|x - member|^2`` and ``|x|^2`` over the cluster's rows.
            An empty cluster has no row of its own: it gets the one at its place in the order, or the last.
        """
        num_rows, wide = order.shape[0], rows.to(accumulator(rows.dtype))
        if num_rows == 0:
            return order, wide.new_zeros(0, 2)
        mean = PlainOps.segment(self, wide, None, None, order, offsets, sizes, True)
        cluster = clustering.cluster_of_row(order, sizes)
        distance, square = (t.square().sum(1) for t in (wide - mean.index_select(0, cluster), wide))
        by_distance = torch.argsort(distance, stable=True)  # ties in the order of rows, as a cluster's rows are
        by_distance = by_distance[torch.argsort(cluster[by_distance], stable=True)]
        place = offsets.clamp(max=num_rows - 1)
        member = torch.where(sizes > 2, by_distance[place], order[place])
        # Sums of the rows' distances and squares, and of n times the member's distance to the mean.
        sums = PlainOps.segment(self, torch.stack([distance, square], 1), None, None, order, offsets, sizes, False)
        sums[:, 0] += torch.where(sizes > 0, sizes * distance[member], 0)
        return member, sums

    def combine(
        self, source: Tensor, index: Tensor, weight: Tensor | None, row: Tensor | None, centroid: Tensor | None
    ) -> Tensor:
        """``out[t] = sum_k weight[t, k] (source[i] + (row[t] - centroid[i]))``, i = index[t, k], skipping slots with i < 0.

        Args:
            source: [C, D]. index: int64 [T, K]. weight: [T, K], ones if None.
            row: [T, D], zeros if None. centroid: [C, D]; None adds the row whole.

        The sum runs over k in order.
        """
        weighted = accumulator(source.dtype) if weight is None else accumulator(source.dtype, weight.dtype)
        out = None
        # One choice at a time: [T, D] of scratch memory instead of [T, K, D].
        for k, i in enumerate(index.unbind(1)):
            part = _pick(source, i).to(weighted)
            if row is not None:
                part = part + (row if centroid is None else row.to(weighted) - _pick(centroid, i))
            if weight is not None:
                part = part * weight[:, k, None]
            part = part.masked_fill((i < 0).unsqueeze(1), 0)  # whatever is there, NaN included
            out = part if out is None else out.add_(part)
        return source.new_zeros(index.shape[0], source.shape[1]) if out is None else out.to(source.dtype)

    def dots(self, grad: Tensor, source: Tensor, index: Tensor, row: Tensor | None, centroid: Tensor | None) -> Tensor:
        """``out[t, k] = <grad[t], source[i] + (row[t] - centroid[i])>``, 0 where i < 0; row and centroid come together.

        Returns:
            [T, K] in the dtype of sums.
        """
        dtype = accumulator(source.dtype, grad.dtype)
        columns = []
        for i in index.unbind(1):
            part = _pick(source, i).to(dtype)
            if row is not None and centroid is not None:
                part = part + (row.to(dtype) - _pick(centroid, i))
            columns.append((part * grad).sum(-1).masked_fill(i < 0, 0))
        return torch.stack(columns, 1) if columns else grad.new_zeros(index.shape, dtype=dtype)

    def spread(
        self,
        grad: Tensor | None,
        weight: Tensor | None,
        sum: Tensor | None,
        grad_centroid: Tensor | None,
        index: Tensor,
        sizes: Tensor,
    ) -> Tensor:
        """``out[t] = sum_k [weight[t, k] grad[t] - sum[i] / sizes[i]] + grad_centroid[i] / sizes[i]``, i = index[t, k].

        Args:
            grad: [T, D] with sum [C, D], or None for no bracket, which is exactly zero for clusters of one row.
            weight: [T, K], ones if None. grad_centroid: [C, D], zeros if None.
        """
        like = grad_centroid if grad is None else grad
        assert like is not None
        out = like.new_zeros(index.shape[0], like.shape[1], dtype=accumulator(like.dtype))
        for k, i in enumerate(index.unbind(1)):
            size = _pick(sizes, i).unsqueeze(1)
            part = torch.zeros_like(out)
            if grad is not None and sum is not None:
                around = grad if weight is None else grad * weight[:, k, None]
                around = around - _pick(sum, i).to(out.dtype) / size.clamp(min=1)
                part = around.masked_fill(size == 1, 0)
            if grad_centroid is not None:
                part = part + _pick(grad_centroid, i).to(out.dtype) / size.clamp(min=1)
            out += part.masked_fill((i < 0).unsqueeze(1), 0)
        return out.to(like.dtype)

    # Products of groups of rows.

    def grouped(self, rows: Tensor, matrices: Tensor, groups: Groups, transposed: bool = False) -> Tensor:
        """The rows of each group times the group's matrix [B, X], or times the matrix transposed.

        What has X columns is in the order of rows, what has B in that of places (``groups.order``).

        Args:
            rows: [N, B], or [N, X] if transposed; in the dtype of sums.
            matrices: [G, B, X], zero beyond a group's width.

        Returns:
            [N, X], or [N, B] if transposed; zero in the rows of no group.
        """
        matrices = matrices.transpose(1, 2) if transposed else matrices
        if rows.shape[0] == 0:
            return rows.new_zeros(0, matrices.shape[2])
        tiles = Tiles.of(groups, rows.shape[0])
        of_rows, of_out = (groups.order, None) if transposed else (None, groups.order)
        products = torch.bmm(pick(rows, tiles, of_rows), matrices[tiles.group_S])
        return put(products, tiles, rows.shape[0], of_out)

    def grouped_outer(self, left: Tensor, right: Tensor, groups: Groups) -> Tensor:
        """``left^T right`` over the rows of each group: [G, B, X].

        Args:
            left: [N, B], by place; zero beyond a group's width.
            right: [N, X], by row.
        """
        num_groups, shape = groups.starts.shape[0], (left.shape[1], right.shape[1])
        if left.shape[0] == 0:
            return left.new_zeros(num_groups, *shape)
        tiles = Tiles.of(groups, left.shape[0])
        products = torch.bmm(pick(left, tiles, None).transpose(1, 2), pick(right, tiles, groups.order)).flatten(1)
        order = torch.arange(products.shape[0], device=left.device)
        return PlainOps.segment(
            self, products, None, None, order, tiles.offsets_G, tiles.sizes_G, False
        ).unflatten(1, shape)  # fmt: skip

    # Numbers on the wire.

    def encode(self, rows: Tensor, noise: Tensor | None, format: str) -> Tensor:
        """Rows [C, D] to bytes: numbers, then scales, in a format of ``wire_formats``: uint8 [C, bytes].

        ``noise`` [C, D] in [0, 1) makes rounding stochastic: up with the probability of the remainder (not for fp8).
        """
        return wire_formats.encode(rows, noise, format)

    def decode(self, payload: Tensor, format: str, features: int, dtype: torch.dtype) -> Tensor:
        """The rows [C, features] that :meth:`encode` made a payload of."""
        return wire_formats.decode(payload, format, features, dtype)


def _pick(source: Tensor, i: Tensor) -> Tensor:
    """``source[i]``, and anything where i < 0."""
    if source.shape[0] == 0:
        return source.new_zeros(i.shape[0], *source.shape[1:])
    return source.index_select(0, i.clamp(min=0))


def by_row(values_TK: Tensor, row_of_TK: Tensor, num_rows: int) -> Tensor:
    """[N]: the value of each row's slot. (A scatter, but no two slots share a row; the last place takes those without.)"""
    values_N = values_TK.new_zeros(num_rows + 1)
    values_N[torch.where(row_of_TK < 0, num_rows, row_of_TK)] = values_TK
    return values_N[:-1]
