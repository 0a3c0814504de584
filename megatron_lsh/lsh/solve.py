"""The inverse of many positive definite matrices, on a GPU without a loop over them."""

from __future__ import annotations

import torch
from torch import Tensor

#: Widest triangles that are left to the library: its kernel for wider ones is launched for every few columns.
_TRIANGLE = 128


def inverse(system_GBB: Tensor) -> Tensor:
    """Of positive definite matrices [G, B, B], fp32 or fp64.

    With a ridge on the diagonal the condition number is at most B / ridge, and one product with the inverse is several times
    faster than two triangular solves. cholesky_ex checks nothing, so nothing waits; ridge keeps the matrices positive.
    """
    factor_GBB = torch.linalg.cholesky_ex(system_GBB)[0]
    if not system_GBB.is_cuda:
        return torch.cholesky_inverse(factor_GBB)
    # There cholesky_inverse is a loop over the batch.
    half_GBB = invert_triangular(factor_GBB)
    return half_GBB.transpose(1, 2) @ half_GBB


def invert_triangular(lower_GBB: Tensor) -> Tensor:
    """Of lower triangular matrices. Wide ones by halves, which are twice as many of half the width:

    [[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]
    """
    groups, size, _ = lower_GBB.shape
    if size <= _TRIANGLE or size % 2:
        identity_BB = torch.eye(size, dtype=lower_GBB.dtype, device=lower_GBB.device)
        return torch.linalg.solve_triangular(lower_GBB, identity_BB.expand_as(lower_GBB), upper=False)
    half = size // 2
    first, last = slice(None, half), slice(half, None)
    p, r = invert_triangular(torch.cat([lower_GBB[:, first, first], lower_GBB[:, last, last]])).split(groups)
    result_GBB = torch.zeros_like(lower_GBB)
    result_GBB[:, first, first], result_GBB[:, last, last] = p, r
    result_GBB[:, last, first] = (r @ lower_GBB[:, last, first] @ p).neg_()
    return result_GBB
