"""What is said when a run ends: what the dispatcher sent and saved, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lsh.config.config import Config
from megatron_lsh.moe.telemetry import LayerReport
from megatron_lsh.observing.metrics import IntervalMetrics


@dataclass
class Payload:
    """What the dispatcher moved over the log intervals of a process: sums, so that a long run needs no more memory."""

    sent: float = 0.0
    """bytes of all MoE layers and iterations"""
    uncompressed: float = 0.0
    network: float = 0.0
    """bytes of these that crossed the network between nodes"""
    network_uncompressed: float = 0.0
    iterations: int = 0
    layers: Sequence[LayerReport] = ()
    """of the last interval"""

    def add(self, metrics: IntervalMetrics) -> None:
        """Count one log interval."""
        figures = metrics.moe_figures()
        self.sent += (figures["alltoall_bytes"] or 0.0) * metrics.iterations
        self.uncompressed += (figures["alltoall_bytes_uncompressed"] or 0.0) * metrics.iterations
        self.network += (figures["alltoall_bytes_network"] or 0.0) * metrics.iterations
        self.network_uncompressed += (figures["alltoall_bytes_network_uncompressed"] or 0.0) * metrics.iterations
        self.iterations += metrics.iterations
        self.layers = metrics.layers


def closing_lines(cfg: Config, payload: Payload) -> list[str]:
    """Three lines for a model with experts (payload, compression per layer, what to try next); none without experts."""
    if not payload.layers:
        return []
    return [
        _payload_line(cfg, payload),
        _layer_line(payload.layers),
        _advice(cfg, payload.layers, payload.uncompressed),
    ]


def _payload_line(cfg: Config, payload: Payload) -> str:
    dispatcher = cfg.moe.moe_token_dispatcher_type
    sent, uncompressed, iterations = payload.sent, payload.uncompressed, payload.iterations
    if uncompressed == 0:
        return f"all-to-all payload ({dispatcher}, {iterations} iterations): none, every rank holds all experts"
    where = ""
    if payload.network_uncompressed > 0:  # what is sent inside a node is cheap: the network is what to save
        where, inside = " across the network", sent - payload.network
        sent, uncompressed = payload.network, payload.network_uncompressed
    saved = 1.0 - sent / uncompressed
    line = (
        f"all-to-all payload{where} ({dispatcher}, {iterations} iterations): {byte_count(sent)} sent, "
        f"{byte_count(uncompressed)} uncompressed: {100.0 * saved:.1f}% saved"
    )
    return f"{line}; {byte_count(inside)} inside nodes" if where else line


def _layer_line(layers: Sequence[LayerReport]) -> str:
    parts = [
        f"layer {layer.layer}: {100.0 * rate:.1f}%, {energy:.3f}"
        for layer in layers
        if (rate := layer["lsh_compression_rate"]) is not None and (energy := layer["lsh_residual_energy"]) is not None
    ]
    if not parts:
        return "LSH compression: off, every row was sent as it is"
    return f"LSH rows sent and residual energy |x-c|^2/|x|^2, last interval: {'; '.join(parts)}"


def _advice(cfg: Config, layers: Sequence[LayerReport], uncompressed: float) -> str:
    if uncompressed == 0:
        return "next: spread the experts over ranks (--expert-model-parallel-size): then there is an all-to-all to compress"
    if all(layer["lsh_compression_rate"] is None for layer in layers):
        return "next: run the same with --moe-token-dispatcher-type lsh and compare loss, bytes and step time"
    control = "the exact control is --moe-token-dispatcher-type alltoall"
    if cfg.lsh.lsh_clustering == "budget":
        half, steps = cfg.lsh.rates().times(0.5), cfg.lsh.lsh_refine_steps
        if half.energy is not None:
            return (
                f"next: --lsh-target-energy {min(2 * half.energy, 0.99):g} sends fewer rows, within --lsh-least-rate and "
                f"--lsh-target-rate; {control}"
            )
        return (
            f"next: --lsh-target-rate {half} sends half as many rows, --lsh-refine-steps {steps + 1} finds closer "
            f"centroids for more arithmetic; {control}"
        )
    hashes, width = cfg.lsh.lsh_num_hashes or 2, cfg.lsh.lsh_hash_width or 8
    return (
        f"next: --lsh-num-hashes {hashes + 1} sends more rows with closer centroids, --lsh-hash-width "
        f"{max(width // 2, 1)} fewer; {control}"
    )


def byte_count(number: float) -> str:
    """``1.23 GB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000.0 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000.0
    raise AssertionError("unreachable")
