"""What the LSH dispatchers of a model merge: which rows, what stood for them, and how far that took their outputs off.

    with watch_merges(model) as found:
        model(tokens_BS)
    found[0].cluster_N          # one record per MoE layer and forward pass, in the order of the layers

A watcher decides nothing itself: it looks at every :class:`Compressed` path as it returns, at what its compressor has put
into the pass (``p.decided``), and runs all rows through their experts once more to compare, as the probe does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lsh.lsh import Clusters, expert_of_row, nearest_members
from megatron_lsh.moe.compressors.lsh import LSHCompressor
from megatron_lsh.moe.dispatcher import Compressed
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.permute import Rows
from megatron_lsh.moe.schedule import Scheduled


@dataclass(frozen=True)
class Merges:
    """One pass of one MoE layer, on the CPU: N rows, one per (token, expert), of which C were sent.

    Attributes:
        layer: its number in the model.
        num_experts: E.
        token_N: int64, the token of each row: ``s * B + b`` of the hidden states [S, B, D].
        expert_N: int64, its expert; rows are sorted by it.
        cluster_N: int64, in [0, C).
        sent_C: int64, of each cluster the row that was sent or, where means are sent, the row nearest to it.
        sends_rows: whether rows were sent, not means.
        missed_N: fp64, |x - c|² of each row x and what was sent for it; energy_N is |x|².
        error_N: fp64, |y - y'|² of each restored output y and the exact one y'; output_N is |y'|².
    """

    layer: int
    num_experts: int
    token_N: Tensor
    expert_N: Tensor
    cluster_N: Tensor
    sent_C: Tensor
    sends_rows: bool
    missed_N: Tensor
    energy_N: Tensor
    error_N: Tensor
    output_N: Tensor


@contextmanager
def watch_merges(model: nn.Module, start_layer: int = 0) -> Iterator[list[Merges]]:
    """Within this context each MoE layer from ``start_layer`` on that can merge rows does, whatever its schedule says, and
    the list grows by a record for each pass. A layer without LSH, or in a model of another dispatcher, leaves none."""
    found: list[Merges] = []
    with ExitStack() as stack:
        for layer in model.modules():
            if not isinstance(layer, MoELayer) or layer.layer < start_layer:
                continue
            for name, alternative in merging(layer.dispatcher)[:1]:
                stack.enter_context(layer.dispatcher.held(name))
                for path in _paths(alternative):
                    stack.callback(path.register_forward_hook(partial(_record, found, layer)).remove)
        yield found


def merging(dispatcher: Scheduled) -> list[tuple[str, nn.Module]]:
    """The alternatives of a layer that merge rows by LSH."""
    modules = [(name, each) for name, each in dispatcher.alternatives.items() if isinstance(each, nn.Module)]
    return [(name, each) for name, each in modules if _paths(each)]


def _paths(alternative: nn.Module) -> list[Compressed]:
    paths = [part for part in alternative.modules() if isinstance(part, Compressed)]
    return [path for path in paths if isinstance(path.compressor, LSHCompressor)]


@torch.no_grad()
def _record(found: list[Merges], layer: MoELayer, path: Compressed, call: tuple[Any, ...], restored: Rows) -> None:
    rows, experts, p = call[:3]
    assert isinstance(path.compressor, LSHCompressor) and path.exact is not None
    assert rows.permutation is not None, "rows of other ranks belong to no token of this one"
    clusters: Clusters = p.decided[path.compressor]
    rows_ND, quiet = rows.materialise(), p.silent()
    sent = path.compressor.represent(rows_ND, clusters, quiet)
    exact_ND = path.exact(Rows(rows_ND, rows.counts_E), experts, quiet).materialise()
    member_C = nearest_members(rows_ND, clusters) if sent.member_C is None else sent.member_C
    energies = [
        t.double().square().sum(1).cpu()
        for t in (
            rows_ND - sent.rows_CD.index_select(0, clusters.cluster_N),
            rows_ND,
            restored.materialise() - exact_ND,
            exact_ND,
        )
    ]
    missed_N, energy_N, error_N, output_N = energies
    found.append(
        Merges(
            layer=layer.layer,
            num_experts=len(rows.counts_E),
            token_N=rows.permutation.token_of_row_N.cpu(),
            expert_N=expert_of_row(rows.counts_E, rows_ND.shape[0]).cpu(),
            cluster_N=clusters.cluster_N.cpu(),
            sent_C=member_C.cpu(),
            sends_rows=sent.member_C is not None,
            missed_N=missed_N,
            energy_N=energy_N,
            error_N=error_N,
            output_N=output_N,
        )
    )
