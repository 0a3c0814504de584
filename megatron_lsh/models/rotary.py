"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split form of Megatron-LM and Llama.

Legend: S sequence, B micro-batch, H heads, R rotated channels of a head. Channel i is rotated together with i + R/2; the
interleaved form (the paper's, GPT-J's) rotates channel 2i together with 2i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of every position's angles, shaped [S, B or 1, 1, R]; the first R channels are rotated."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __call__(self, x_SBHd: Tensor) -> Tensor:
        """Rotate queries or keys; channels beyond R pass unchanged. Keeps the dtype."""
        rotated = self.cos.shape[-1]
        x, rest = x_SBHd[..., :rotated], x_SBHd[..., rotated:]
        if self.interleaved:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            low, high = x.chunk(2, dim=-1)
            turned = torch.cat((-high, low), dim=-1)
        x = x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype)
        return torch.cat((x, rest), dim=-1) if rest.shape[-1] else x


def rotary_embedding(
    positions: Tensor, head_dim: int, *, percent: float = 1.0, base: float = 10000.0, interleaved: bool = False
) -> Rotary:
    """The rotation of each position: angle_i = position * base^(-2i/R) for i in [0, R/2).

    Args:
        positions: int64 [S], or [B, S] where sequences count differently (``--reset-position-ids``).
        head_dim: channels of one head, of which the share `percent` is rotated (R, rounded down to an even number).
        interleaved: which channels are rotated together, see above.
    """
    rotated = int(head_dim * percent) // 2 * 2
    # fp32 whatever the model computes in: bf16 cannot tell position 256 from 257.
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=positions.device) / rotated
    positions_SB = positions.unsqueeze(-1) if positions.dim() == 1 else positions.t()
    angles = positions_SB.float()[..., None, None] * base**-exponents  # [S, B or 1, 1, R/2]
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return Rotary(angles.cos(), angles.sin(), interleaved)
