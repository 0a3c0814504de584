"""Rates of LSH that follow the residual energy (``--lsh-target-energy``).

While a layer runs it adds up what its clusters miss (:class:`FollowedRate`). At the end of an iteration the sums of all
ranks are added in the all-reduce that tells them the loss, so nobody waits for more, and every rank moves every layer's
rate by the same rule, ``Rates.followed`` (config/rates.py). They must not differ in a single bit, because at node scope
ranks work out one another's budgets: what is added are whole numbers below 2**53, whose sum does not depend on its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_lsh.config.rates import Rates

_UNITS = 2.0**16
"""in which a rank tells its energy; times the rows of a step, 2**37 leaves enough for all of them"""


class FollowedRate:
    """The rate of one layer, and what was seen of its rows since it moved.

    Attributes:
        layer: number in the model.
        rate: now.
    """

    def __init__(self, layer: int, rate: float) -> None:
        self.layer, self.rate = layer, rate
        self._rows = 0
        self._missed: Tensor | None = None
        self._total: Tensor | None = None

    def see(self, rows: int, missed: Tensor, total: Tensor) -> None:
        """Count the rows of a micro-batch, and sums of |x - c|^2 and |x|^2 over them (0-dim; nobody waits for them)."""
        self._rows += rows
        self._missed = missed if self._missed is None else self._missed + missed
        self._total = total if self._total is None else self._total + total

    def take(self, device: torch.device) -> Tensor:
        """fp64 [2], whole numbers: the energy that this rank missed, times its rows; and these. Then it counts afresh.

        Zeros where there was no row, or the energy is not finite.
        """
        rows, missed, total = self._rows, self._missed, self._total
        self._rows, self._missed, self._total = 0, None, None
        if missed is None or total is None:
            return torch.zeros(2, dtype=torch.float64, device=device)
        energy = missed.double() / total.double()
        known = torch.isfinite(energy)
        units = torch.floor(torch.where(known, energy, 0.0).clamp(0.0, 1.0) * _UNITS)
        return torch.stack([units, known.double()]).to(device) * rows


class LayerRates:
    """The rates of all layers of the model, those of other pipeline stages too; the same on every rank."""

    def __init__(self, rates: Rates, num_layers: int, held: Sequence[FollowedRate]) -> None:
        """``held``: those of the layers on this rank, out of ``num_layers`` of the model; one or more of a layer."""
        self._rates, self._held = rates, [[f for f in held if f.layer == layer] for layer in range(num_layers)]
        self.of_layer = [rates.at(layer, 0) for layer in range(num_layers)]

    def seen(self, device: torch.device) -> Tensor:
        """fp64 [2 layers], to be added over the ranks: of each layer what :meth:`FollowedRate.take` gives."""
        seen_L2 = torch.zeros(len(self.of_layer), 2, dtype=torch.float64, device=device)
        for sum_2, held in zip(seen_L2, self._held, strict=True):
            for followed in held:
                sum_2 += followed.take(device)
        return seen_L2.flatten()

    def move(self, sums: Sequence[float], iteration: int) -> None:
        """The rates of this iteration, given the sums over all ranks of the one before."""
        for layer, (missed, rows) in enumerate(zip(sums[::2], sums[1::2], strict=True)):
            energy = missed / rows / _UNITS if rows > 0 else None
            self._set(layer, self._rates.followed(layer, iteration, self.of_layer[layer], energy))

    def state_dict(self) -> dict[str, float]:
        """Plain JSON: layer -> rate."""
        return {str(layer): rate for layer, rate in enumerate(self.of_layer)}

    def load_state_dict(self, saved: Mapping[str, float], iteration: int) -> None:
        """Take rates over for this iteration, within today's bounds."""
        for layer, rate in enumerate(self.of_layer):
            self._set(layer, self._rates.followed(layer, iteration, float(saved.get(str(layer), rate)), None))

    def _set(self, layer: int, rate: float) -> None:
        self.of_layer[layer] = rate
        for followed in self._held[layer]:
            followed.rate = rate
