"""The key/value cache: logits as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.model_helpers import LLAMA_LIKE, MOE, make_batch, make_config, make_gpt, randomize

OLMOE_LIKE = {**LLAMA_LIKE, **MOE, "qk_layernorm": True, "qk_layernorm_width": "full", "moe_router_pre_softmax": True}


@pytest.mark.parametrize("settings", [{}, LLAMA_LIKE, OLMOE_LIKE])
@torch.no_grad()
def test_logits_are_those_of_a_whole_pass(settings: dict[str, Any]) -> None:
    """In pieces of any length, rows at different positions, with padding that is overwritten later."""
    model = randomize(make_gpt(make_config(**settings))).eval()
    tokens_BS, _ = make_batch(batch=2, length=12)
    whole = model(tokens_BS)
    cache = model.new_cache(16)

    def step(spans: list[tuple[int, int]]) -> None:
        """Feed positions [first, last) of each row and compare."""
        width = max(last - first for first, last in spans)
        positions_BS = torch.tensor([[first + i for i in range(width)] for first, _ in spans])
        cache.place(positions_BS, torch.device("cpu"))
        inside_BS = positions_BS < torch.tensor([[last] for _, last in spans])
        fed_BS = tokens_BS.gather(1, positions_BS.clamp(max=11)).masked_fill(~inside_BS, 63)
        logits = model(fed_BS, position_ids_BS=positions_BS, cache=cache)
        for row, (first, last) in enumerate(spans):
            expected = whole[row, first:last]
            torch.testing.assert_close(logits[row, : last - first], expected, rtol=0, atol=2e-5)

    step([(0, 5), (0, 2)])
    step([(5, 6), (2, 3)])
    step([(6, 9), (3, 9)])
    step([(9, 12), (9, 10)])
    step([(11, 12), (10, 12)])  # seen twice: nothing changes


def test_misuse() -> None:
    model = make_gpt(make_config())
    tokens_BS, _ = make_batch(length=4)
    with pytest.raises(ValueError, match=r"call KVCache\.place"):
        model(tokens_BS, cache=model.new_cache(8))
    with pytest.raises(ValueError, match="position 8 is beyond the cache's capacity of 8"):
        model.new_cache(8).place(torch.tensor([[8]]), torch.device("cpu"))
