"""A dispatch leaves nothing behind: what a graph keeps goes with it, without waiting for Python to look for circles."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from megatron_lsh.config.parallel import ParallelConfig
from megatron_lsh.moe import layer_pass, transport
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.models.model_helpers import LLAMA_LIKE, MOE, make_batch, make_config, make_gpt

EXACT, LSH = {"moe_token_dispatcher_type": "alltoall"}, {"moe_token_dispatcher_type": "lsh", "lsh_scope": "rank"}
WAYS: dict[str, dict[str, Any]] = {
    "exact": {**EXACT, "moe_node_deduplication": "off"},
    "exact, 2 pieces": {**EXACT, "moe_node_deduplication": "off", "moe_overlap_chunks": 2},
    "de-duplicated": {**EXACT, "moe_node_deduplication": "on"},
    "lsh": LSH,
    "lsh, 2 pieces": {**LSH, "moe_overlap_chunks": 2},
    "lsh per node": {**LSH, "lsh_scope": "node"},
    "lsh per node, 2 pieces": {**LSH, "lsh_scope": "node", "moe_overlap_chunks": 2},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}
AGAIN: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def living() -> dict[str, list[tuple[int, int]]]:
    """By way, after a step without recomputation and two with it: passes and crossings that live."""
    ctx = initialize(ParallelConfig(expert_model_parallel_size=4, moe_node_size=2))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    for kind in (layer_pass.LayerPass, transport._Crossing):
        kind.__init__ = _noting(kind.__init__, alive)  # type: ignore[misc] - this process is the test's own
    found: dict[str, list[tuple[int, int]]] = {}
    for name, way in WAYS.items():
        for recompute in ({}, AGAIN):
            cfg = make_config(**{**LLAMA_LIKE, **MOE, "num_layers": 1, "moe_layer_freq": 1, **way, **recompute})
            model = make_gpt(cfg, ctx)
            gc.collect()
            gc.disable()
            for step in range(2 if recompute else 1):
                losses, aux = model(*make_batch(2, 16, seed=step))
                (losses.mean() + aux).backward()
                del losses, aux
                kinds = [type(item) for item in alive]
                lives = (kinds.count(layer_pass.LayerPass), kinds.count(transport._Crossing))
                found.setdefault(name, []).append(lives)
            gc.enable()
    return found


def _noting(create: Any, alive: weakref.WeakSet[Any]) -> Any:
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        alive.add(self)

    return init


def test_passes_and_flights_go_with_their_graph() -> None:
    for found in run_distributed_test(living, 4):
        assert found == dict.fromkeys(WAYS, [(0, 0)] * 3)
