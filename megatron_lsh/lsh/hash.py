"""Cross-polytope hashing: the signed axis nearest to a random rotation of a row.

For a random ``R`` in R^{D x W} the hash of a row x is the index of the largest ``|(x R)_i|`` together with its sign,
one of 2 W values (equation 3 of the paper; Andoni et al. 2015, "Practical and Optimal LSH for Angular Distance").
Q independent hashes are computed by one matrix product with their rotations side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lsh.ops import choose
from megatron_lsh.ops.clustering import codes_of


def make_rotation(
    hidden: int, num_hashes: int, width: int, *, seed: int, stream: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the random projection of all hashes.

    A pure function of its arguments: every rank, every resumed run and every recomputation gets the same tensor,
    whatever the device, because it is drawn on the CPU.

    Args:
        hidden: D. num_hashes: Q. width: W.
        seed: ``--lsh-seed``.
        stream: distinguishes independent draws with one seed (the MoE layer's number).

    Returns:
        fp32 [D, Q * W], standard normal. (A Gaussian matrix instead of an orthogonal one: the hash depends only on
        which projection is largest, so the scale is irrelevant and near-orthogonality suffices.)
    """
    if torch.device(device).type == "meta":
        return torch.empty(hidden, num_hashes * width, device="meta")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stream) % (1 << 63))
    return torch.randn(hidden, num_hashes * width, generator=generator).to(device)


@torch.no_grad()
def project(rows_ND: Tensor, rotation_DQW: Tensor) -> Tensor:
    """``rows @ rotation`` in the rotation's dtype (fp32): [N, Q * W]."""
    return choose(rows_ND).project(rows_ND, rotation_DQW)


@torch.no_grad()
def hash_rows(rows_ND: Tensor, rotation_DQW: Tensor, num_hashes: int) -> Tensor:
    """Hash every row; scaling a row by a positive number never changes its codes.

    Args:
        rows_ND: any floating dtype; the projection is computed in fp32.
        rotation_DQW: from :func:`make_rotation`, [D, Q * W].
        num_hashes: Q.

    Returns:
        int64 codes [N, Q] in [0, 2 W): ``2 * argmax_w |projection| + [projection > 0]``.
    """
    return codes_of(project(rows_ND, rotation_DQW), num_hashes)
