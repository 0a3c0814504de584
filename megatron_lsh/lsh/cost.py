"""What interpolated restoration costs, in multiply-adds counted as two operations, per row, forward and backward.

With B representatives in a block, D features, and a share r of the rows sent (what is sent does not move; letters as in
interpolate.py):

    k(x), G C, G^T X and the products with outputs and their gradients    12 (1 - r) B D     both forms
    K, and its part in the gradient                                        4 r B D           both forms
    W = M Y, M dW, (sums + M dW) W^T                                       6 r B D           "outputs"
    (k(x) - K_own) M, dA M, (D M)^T dD                                     6 (1 - r) B^2     "weights"
    M: B^3 for each block of B / r rows                                    r B^2             both forms

A row of an exact expert of width F takes 18 F D with SwiGLU, else 12 F D.
"""

from __future__ import annotations

from typing import NamedTuple

#: Of the exact experts' arithmetic: what ``--lsh-interpolation-block auto`` may take.
MOST = 0.05
LEAST, STEP, LARGEST = 128, 64, 2048


class Restoration(NamedTuple):
    """Attributes:
    block: representatives that one function is fitted to, at most.
    form: "outputs" or "weights".
    share: of the exact experts' arithmetic; None where their width is not known.
    """

    block: int
    form: str
    share: float | None


def operations(form: str, block: int, hidden: int, rate: float) -> float:
    """Per row routed, forward and backward; the module's docstring has the terms."""
    moving = 1 - rate
    common = 12 * moving * block * hidden + 4 * rate * block * hidden + rate * block**2
    return common + (6 * rate * block * hidden if form == "outputs" else 6 * moving * block**2)


def choose_restoration(
    hidden: int, width: int | None, gated: bool, rate: float, block: int | None = None
) -> Restoration:
    """The cheaper form, and the block.

    Args:
        hidden: D. width: F; None where it is not known. gated: SwiGLU.
        rate: share of the rows that are sent.
        block: as told; None for the largest multiple of 64 whose cost is at most :data:`MOST` of the exact experts',
            but 128 at least.
    """
    experts = None if width is None else (18 if gated else 12) * width * hidden

    def of(size: int) -> Restoration:
        form = min(("outputs", "weights"), key=lambda form: operations(form, size, hidden, rate))
        return Restoration(size, form, None if experts is None else operations(form, size, hidden, rate) / experts)

    if block is not None:
        return of(block)
    found = of(LEAST)
    for size in range(LEAST + STEP, LARGEST + 1, STEP):
        larger = of(size)
        if larger.share is None or larger.share > MOST:
            break
        found = larger
    return found
