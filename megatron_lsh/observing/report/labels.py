"""What figures are called on the page: as their gauges say."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from megatron_lsh.moe.layer import GAUGES
from megatron_lsh.observing.report.runs import RunData

_PER_LAYER = "_per_layer"
_OF_THE_STEP = MappingProxyType({"alltoall_share": "all-to-all, share of the step"})


def label_of(key: str) -> str:
    """A few words for a key of the metrics: its gauge's label and unit, else the key in words."""
    for gauge in GAUGES:
        if key in (gauge.name, gauge.model_name):
            unit = "" if not gauge.unit or gauge.unit in gauge.label else f", {gauge.unit}"
            return gauge.label + unit
    return _OF_THE_STEP.get(key, key.replace("_", " "))


def further_gauges(runs: Sequence[RunData]) -> list[str]:
    """Gauges in the records that are not of this package: those of a dispatcher plug-in."""
    ours = {gauge.name for gauge in GAUGES}
    found = dict.fromkeys(
        key.removesuffix(_PER_LAYER)
        for run in runs
        for record in run.training[-1:]
        for key in record
        if key.endswith(_PER_LAYER)
    )
    return [name for name in found if name not in ours]
