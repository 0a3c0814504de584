"""Warns when the rows that LSH restores are far from what their experts would have given (``--lsh-probe-warn``)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.telemetry import LayerReport

#: The gauge of ``--lsh-probe-interval`` that is looked at.
GAUGE = "lsh_restored_error"


class RestoredErrors:
    """Which layers are above the threshold.

    Attributes:
        above: numbers of these layers, at their last probe.
    """

    def __init__(self, cfg: LSHConfig) -> None:
        self._cfg = cfg
        self.above: set[int] = set()

    @property
    def watched(self) -> bool:
        """Whether there are probes, and a threshold."""
        return self._cfg.lsh_probe_interval is not None and self._cfg.lsh_probe_warn > 0

    def look(self, layers: Sequence[LayerReport]) -> str | None:
        """A line for the log if a layer has come above the threshold since the last look; those above it are named.

        A layer that stays above is not told of again, unless another one comes. One without a probe stays where it was.
        """
        found = {layer.layer: error for layer in layers if (error := layer.figures.get(GAUGE)) is not None}
        if not self.watched or not found:
            return None
        before, threshold = self.above, self._cfg.lsh_probe_warn
        self.above = {layer for layer in before if layer not in found}
        self.above |= {layer for layer, error in found.items() if not error <= threshold}  # NaN is above everything
        if self.above <= before:
            return None
        errors = ", ".join(f"layer {layer}: {found[layer]:.3f}" for layer in sorted(self.above & found.keys()))
        return (
            f"WARNING: restored rows are off by more than --lsh-probe-warn {threshold:g} (error over energy of the exact "
            f"outputs; {errors}), which costs loss: {'; '.join(self._ways_out())}"
        )

    def _ways_out(self) -> list[str]:
        cfg = self._cfg
        if cfg.lsh_clustering == "bucket":
            more = "--lsh-clustering budget sends what --lsh-target-rate says"
        elif cfg.lsh_target_energy is not None:
            more = f"--lsh-target-energy {cfg.lsh_target_energy / 2:g} sends more rows, at most --lsh-target-rate"
        else:
            more = f"--lsh-target-rate {cfg.rates().times(2.0)} sends twice the rows"
        closer = [] if cfg.lsh_residual == "interpolate" else ["--lsh-residual interpolate restores closer"]
        return [
            more,
            *closer,
            "a larger --micro-batch-size, or --lsh-scope node over nodes, finds more alike rows",
            "--lsh-anneal-iters N ends exactly",
        ]
