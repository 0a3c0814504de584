"""Restoration by differences in plain PyTorch: what stands around its grouped products (``lsh/tensor_cores.py``).

G blocks of B places; block g is a run of ``widths[g]`` clusters from ``starts[g]`` on, in its first places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.ops.dtypes import accumulator

#: exp of it times the least K that is not zero is finite. An exponent that rises more is that of a row of which its own
#: representative knows nothing.
_MOST_RISE = 80.0


class PlainDifferences:
    """The definitions. Sums, and what is [G, B, B], are in fp32 or better."""

    def differences(
        self, rows: Tensor, order: Tensor | None, cluster: Tensor, representatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``rows[order[n]] - representatives[cluster[n]]`` [N, D] in their dtype, and its square [N]."""
        own = representatives.index_select(0, cluster)
        offset = torch.sub(rows if order is None else rows.index_select(0, order), own, out=own)
        return offset, torch.linalg.vector_norm(offset, dim=1, dtype=accumulator(offset.dtype)).square_()

    def place(self, source: Tensor, starts: Tensor, widths: Tensor, mean: Tensor | None, places: int) -> Tensor:
        """Rows of clusters [C, D] in their places [G, B, D], less the mean [G, D] if there is one; zero elsewhere."""
        valid = _valid(widths, places)
        cluster = torch.where(valid, starts.unsqueeze(1) + torch.arange(places, device=source.device), 0)
        placed = source.index_select(0, cluster.flatten()).view(*cluster.shape, -1)
        if mean is not None:
            placed = placed - mean.unsqueeze(1)
        return placed.masked_fill(~valid.unsqueeze(2), 0)

    def fit(self, products: Tensor, widths: Tensor, ridge: float, width: float) -> tuple[Tensor, Tensor, Tensor]:
        """What the functions of all blocks owe to where their points are.

        Args:
            products: [G, B, B], of the points c, less their mean.
            width: of the kernel, in mean squared distances.

        Returns:
            s [G], K and K + ridge I [G, B, B]: K_ij = exp(-|c_i - c_j|^2 / s); zero and the identity where there is no
            point.
        """
        valid = _valid(widths, products.shape[1])
        norm = products.diagonal(dim1=1, dim2=2)
        # Between two of n points |c_i - c_j|^2 is on average twice their variance.
        scale = (2 * width / widths.to(norm.dtype) * norm.masked_fill(~valid, 0).sum(1)).clamp(min=1e-20)
        far = norm.masked_fill(~valid, torch.inf)  # exp makes it zero
        among = (2 * products).sub_(far.unsqueeze(2)).sub_(far.unsqueeze(1)).div_(scale[:, None, None]).exp_()
        diagonal = torch.full_like(far, 1.0).masked_fill_(valid, ridge)
        return scale, among, among + torch.diag_embed(diagonal)

    def most_half(self, matrices: Tensor) -> int:
        """Of how many rows matrices may be at most for :meth:`half_inverse`."""
        return matrices.shape[1]

    def half_inverse(self, matrices: Tensor) -> Tensor:
        """Of positive definite matrices [G, B, B]: lower triangular T, with T^T T their inverse."""
        factor = torch.linalg.cholesky_ex(matrices)[0]  # checks nothing, so nothing waits
        identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
        return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)

    def split(self, inverse: Tensor, widths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The inverse [G, B, B], its rows less their mean and that mean in the last column, in two numbers of a dtype.

        Returns:
            [G, 3 B, B]: high, low, high; and [G, 2 B, B]: high and low, each transposed.
        """
        valid = _valid(widths, inverse.shape[1])
        inverse = inverse * valid.unsqueeze(2) * valid.unsqueeze(1)
        mean = inverse.sum(2, keepdim=True) / widths.to(inverse.dtype)[:, None, None]
        centred = (inverse - mean) * valid.unsqueeze(1)
        centred[:, :, -1:] = mean
        high, low = _in_two(centred, dtype)
        return torch.cat([high, low, high], 1), torch.cat([high, low], 2).transpose(1, 2).contiguous()

    def changes(
        self, products: Tensor, square: Tensor, slot: Tensor, moves: Tensor, among: Tensor, scale: Tensor
    ) -> Tensor:
        """``k(x) - k(c_own)`` of each row in two numbers [N, 3 B]: high, high, low.

        Args:
            products: [N, B], of offsets x - c_own and points. square: [N], of the offsets.
            slot: int64 [N], the place of c_own among the G B. moves: bool [N]; where it is false the change is zero.
            among, scale: K [G, B, B] and s [G].
        """
        rise, among_own, _ = _rise(products, square, slot, moves, among, scale)
        high, low = _in_two(rise.mul_(among_own), products.dtype)
        return torch.cat([high, high, low], 1)

    def changes_backward(
        self,
        grad: Tensor,
        products: Tensor,
        square: Tensor,
        slot: Tensor,
        moves: Tensor,
        among: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From the gradient of ``k(x) - k(c_own)`` [N, B], in its dtype.

        Returns:
            It, where a row moves; 2 / s times it times k(x) - k(c_own); 2 / s times it times k(x); the last less its sum at
            c_own; and the sum [N].
        """
        rise, among_own, factor = _rise(products, square, slot, moves, among, scale)
        grad = grad.masked_fill(~moves.unsqueeze(1), 0)
        weight = grad * factor * among_own
        difference = (weight * rise).to(grad.dtype)
        whole = weight.addcmul_(weight, rise)
        pull = whole.sum(1, keepdim=True)
        own = (slot % products.shape[1]).unsqueeze(1)
        to_own = whole.scatter(1, own, whole.gather(1, own) - pull)
        return grad, difference, whole.to(grad.dtype), to_own.to(grad.dtype), pull.squeeze(1)

    def pairs(
        self,
        by_own: Tensor,
        difference: Tensor,
        by_inverse: Tensor,
        among: Tensor,
        scale: Tensor,
        starts: Tensor,
        widths: Tensor,
    ) -> Tensor:
        """[G, B, B], whose product with the points is their gradient through pairs of points.

        Args:
            by_own, difference: [C, B], sums of the first two of :meth:`changes_backward` over the rows of each cluster.
            by_inverse: [G, B, B], weights^T times the first; the last row belongs to all.
        """
        places, dtype, factor = among.shape[1], by_own.dtype, (2 / scale)[:, None, None] * among
        by_own, difference = (
            PlainDifferences.place(self, x, starts, widths, None, places).to(factor.dtype) for x in (by_own, difference)
        )
        by_inverse = by_inverse.to(factor.dtype)
        by_inverse = (by_inverse + by_inverse[:, -1:]) * factor
        pairs = (difference - by_inverse).transpose(1, 2) - by_own * factor - by_inverse
        valid = _valid(widths, places)
        pairs = pairs * valid.unsqueeze(1) * valid.unsqueeze(2)
        pairs.diagonal(dim1=1, dim2=2).sub_(pairs.sum(2))
        return pairs.to(dtype)

    def less(self, x: Tensor, weight: Tensor, offset: Tensor, order: Tensor | None) -> Tensor:
        """``x[n] - weight[n] offset[n]`` [N, D], to be row ``order[n]``."""
        result = torch.addcmul(x, offset, weight.unsqueeze(1).to(x.dtype), value=-1)
        return result if order is None else torch.empty_like(result).index_copy_(0, order, result)


def _valid(widths: Tensor, places: int) -> Tensor:
    """bool [G, B]: the places that a cluster has."""
    return torch.arange(places, device=widths.device) < widths.unsqueeze(1)


def _in_two(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers of this dtype whose sum is x."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def _rise(
    products: Tensor, square: Tensor, slot: Tensor, moves: Tensor, among: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """exp t - 1 and K_own [N, B], and 2 / s [N, 1]."""
    places = products.shape[1]
    block = torch.div(slot, places, rounding_mode="floor")
    factor = (2 / scale).index_select(0, block).unsqueeze(1)
    own = products.gather(1, (slot - block * places).unsqueeze(1)).to(factor.dtype)
    shift = (own + square.unsqueeze(1) / 2) * factor
    exponent = torch.mul(products, factor).sub_(shift).clamp_(max=_MOST_RISE).masked_fill_(~moves.unsqueeze(1), 0)
    return exponent.expm1_(), among.flatten(0, 1).index_select(0, slot), factor
