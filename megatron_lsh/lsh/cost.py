"""What interpolated restoration costs, in multiply-adds counted as two operations, per row, forward and backward.

With B representatives in a block, D features, and a share r of the rows sent (what is sent does not move; letters as in
interpolate.py):

    k(x), G C, G^T X and the products with outputs and their gradients    12 (1 - r) B D     both forms
    K, and its part in the gradient                                        4 r B D           both forms
    W = M Y, M dW, (sums + M dW) W^T                                       6 r B D           "outputs"
    (k(x) - K_own) M, dA M, (D M)^T dD                                     6 (1 - r) B^2     "weights"
    M: B^3 for each block of B / r rows                                    r B^2             both forms

In R coordinates ("outputs" only): the above with R in the place of D, and

    R coordinates of rows, outputs from R, and back                        8 (1 - r) R D
    of representatives and their outputs                                   8 r R D
    their directions: 3 products, and orthonormal ones for B / r rows      6 r R D + 18 r R^2 D / B

A row of an exact expert of width F takes 18 F D with SwiGLU, else 12 F D.
"""

from __future__ import annotations

from typing import NamedTuple

#: Coordinates that may be chosen, and how much wider a fit in so few must be than in all, to make up for what it leaves out.
RANKS, WIDER = (16, 32, 64, 128, 256), 4

#: Of the exact experts' arithmetic: what ``--lsh-interpolation-block auto`` may take.
MOST = 0.05
LEAST, STEP, LARGEST = 128, 64, 2048


class Restoration(NamedTuple):
    """Attributes:
    block: representatives that one function is fitted to, at most.
    form: "outputs" or "weights".
    share: of the exact experts' arithmetic; None where their width is not known.
    rank: coordinates that it sees; None for all.
    beyond: the rank holds where an expert has more representatives than this; where all have fewer, all coordinates are
        affordable.
    """

    block: int
    form: str
    share: float | None
    rank: int | None = None
    beyond: int = 0

    def operations(self, clusters: int, hidden: int, rate: float) -> float:
        """As the function of this name, for an expert with so many representatives."""
        rank = self.rank if clusters > self.beyond else None
        return operations(self.form, min(self.block, clusters), hidden, rate, rank)


def operations(form: str, block: int, hidden: int, rate: float, rank: int | None = None) -> float:
    """Per row routed, forward and backward; the module's docstring has the terms."""
    if rank is not None and rank < hidden:
        mapped = (8 + 6 * rate) * rank * hidden + 18 * rate * rank**2 * hidden / block
        return operations("outputs", block, rank, rate) + mapped
    moving = 1 - rate
    common = 12 * moving * block * hidden + 4 * rate * block * hidden + rate * block**2
    return common + (6 * rate * block * hidden if form == "outputs" else 6 * moving * block**2)


def grouping_operations(clusters: float, hidden: int, hashes: int, width: int, steps: int) -> float:
    """Per row: its projection onto Q rotations of width W, and in each step of refinement its distances to the centroids of
    its expert, `clusters` of them."""
    return 2.0 * hidden * hashes * width + 2.0 * steps * clusters * hidden


def choose_restoration(
    hidden: int,
    width: int | None,
    gated: bool,
    rate: float,
    block: int | None = None,
    rank: int | None = None,
) -> Restoration:
    """The cheaper form, the block, and how many coordinates.

    Args:
        hidden: D. width: F; None where it is not known. gated: SwiGLU.
        rate: share of the rows that are sent.
        block: as told; None for the largest multiple of 64 whose cost is at most :data:`MOST` of the exact experts',
            but 128 at least.
        rank: as told; None for all coordinates; 0 for the most of :data:`RANKS` in which a block :data:`WIDER` times as
            wide as in all of them costs at most :data:`MOST`, and all where there is none.
    """
    experts = None if width is None else (18 if gated else 12) * width * hidden

    def of(size: int, rank: int | None = None) -> Restoration:
        cheaper = min(("outputs", "weights"), key=lambda form: operations(form, size, hidden, rate))
        cost = operations(cheaper, size, hidden, rate, rank)
        return Restoration(size, cheaper, None if experts is None else cost / experts, rank)

    def largest(rank: int | None = None) -> Restoration:
        if block is not None:
            return of(block, rank)
        found = of(LEAST, rank)
        for size in range(LEAST + STEP, LARGEST + 1, STEP):
            larger = of(size, rank)
            if larger.share is None or larger.share > MOST:
                break
            found = larger
        return found

    whole = largest()
    if rank is None or rank >= hidden:
        return whole
    if rank > 0:
        return largest(rank)
    for few in reversed([each for each in RANKS if each < hidden]):
        wide = largest(few)
        if wide.share is not None and wide.share <= MOST and wide.block >= WIDER * whole.block:
            return wide._replace(form=whole.form, beyond=whole.block)
    return whole
