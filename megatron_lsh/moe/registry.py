"""Token dispatchers by name: what ``--moe-token-dispatcher-type`` picks from.

A dispatcher is an exchange (how rows move) and a compressor (what moves). Third parties add one without touching this
package, either as an entry point in the group ``megatron_lsh.dispatchers``, or by giving ``package.module:factory`` as the
flag's value. A factory takes a :class:`DispatcherSpec` and returns a :class:`TokenDispatcher`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points

from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.auto import Trial
from megatron_lsh.moe.compressor import Compressor, LSHCompressor, NoCompressor
from megatron_lsh.moe.exchange import AllGatherExchange, AllToAllExchange, Exchange, LocalExchange
from megatron_lsh.moe.low_rank import LowRankResidual
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.moe.wire import make_codec
from megatron_lsh.parallel.context import ParallelContext

ENTRY_POINT_GROUP = "megatron_lsh.dispatchers"


@dataclass(frozen=True)
class DispatcherSpec:
    """Everything a factory may need to build the dispatcher of one MoE layer.

    Attributes:
        hidden: D, width of a row.
        num_experts: E.
        layer: number of the layer in the model.
    """

    moe: MoEConfig
    lsh: LSHConfig
    ctx: ParallelContext
    hidden: int
    num_experts: int
    layer: int
    telemetry: MoETelemetry


@dataclass(frozen=True)
class TokenDispatcher:
    """How the rows of one MoE layer reach their experts. A compressor with buffers should be an ``nn.Module``."""

    exchange: Exchange
    compressor: Compressor
    trial: Trial | None = None
    """decides whether the compressor is used; None: always"""


DispatcherFactory = Callable[[DispatcherSpec], TokenDispatcher]


def _exchange(spec: DispatcherSpec, kind: type[Exchange]) -> Exchange:
    kind = LocalExchange if spec.ctx.ep.size == 1 else kind
    return kind(spec.ctx.ep, spec.num_experts, spec.layer, spec.telemetry, make_codec(spec.lsh.lsh_wire_dtype))


def _alltoall(spec: DispatcherSpec) -> TokenDispatcher:
    return TokenDispatcher(_exchange(spec, AllToAllExchange), NoCompressor())


def _allgather(spec: DispatcherSpec) -> TokenDispatcher:
    return TokenDispatcher(_exchange(spec, AllGatherExchange), NoCompressor())


def _lsh(spec: DispatcherSpec) -> TokenDispatcher:
    low_rank = None
    if spec.lsh.lsh_residual == "lowrank":
        low_rank = LowRankResidual(spec.num_experts, spec.hidden, spec.lsh.lsh_residual_rank, spec.ctx)
    compressor = LSHCompressor(spec.lsh, spec.hidden, spec.layer, spec.telemetry, spec.ctx.device, low_rank)
    return TokenDispatcher(_exchange(spec, AllToAllExchange), compressor)


def _auto(spec: DispatcherSpec) -> TokenDispatcher:
    if spec.ctx.ep.size == 1 or spec.layer < spec.lsh.lsh_start_layer:  # no row travels, or none may be compressed
        return _alltoall(spec)
    trial = Trial(spec.layer, spec.lsh.lsh_auto_iters, spec.ctx.device)
    return dataclasses.replace(_lsh(spec), trial=trial)


def builtin_dispatchers() -> dict[str, DispatcherFactory]:
    """The dispatchers of this package. With one expert-parallel rank each uses the local exchange."""
    return {"alltoall": _alltoall, "allgather": _allgather, "lsh": _lsh, "auto": _auto}


def resolve_dispatcher(name: str) -> DispatcherFactory:
    """Find the factory for a value of ``--moe-token-dispatcher-type``.

    Raises:
        ConfigError: unknown name, or a ``module:factory`` that cannot be imported.
    """
    known = builtin_dispatchers()
    if name in known:
        return known[name]
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in plugins:
        return plugins[name].load()
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"--moe-token-dispatcher-type ({name}) must name an importable factory as package.module:factory; {error}"
            ) from error
    names = sorted([*known, *plugins])
    nearest = get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ConfigError(
        f"--moe-token-dispatcher-type ({name}) must be one of {', '.join(names)}, or package.module:factory{hint}"
    )
