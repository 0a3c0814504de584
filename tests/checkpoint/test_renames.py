"""A parameter that was renamed since a checkpoint was written is found under its old name, everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_lsh.checkpoint.agreement import Ranks
from megatron_lsh.checkpoint.reader import LoadOptions, find_checkpoint, load_checkpoint
from megatron_lsh.checkpoint.renames import RENAMED, present_name
from megatron_lsh.checkpoint.writer import layout_of
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.context import offline_context
from tests.checkpoint.toy import ODD, Trainer, manager

CTX = offline_context(device="cpu")
NOW = (("^odd$", "rows.strange"), ("^embedding", "table"))


class Renamed(Trainer):
    """The same trainer with other names for some of its parameters."""

    def __init__(self) -> None:
        super().__init__(CTX, seed=99)
        self.model.rows = nn.Module()
        self.model.rows.strange = self.model.odd
        del self.model.odd
        self.model.table = self.model.embedding
        del self.model.embedding


def test_weights_and_optimizer_state_of_old_names_are_loaded(tmp_path: Path) -> None:
    run = Trainer(CTX)
    run.train(3)
    manager(CTX, tmp_path).save(run.state(padded_rows={"odd": ODD}))
    other, ranks = Renamed(), Ranks(CTX, timeout=None)  # type: ignore[arg-type]
    found = find_checkpoint(tmp_path, None, ranks, lambda text: None)
    assert found is not None
    plain = LoadOptions(optimizer=True, rng=True, weights_only=False, new_function=False, renamed=())
    with pytest.raises(CheckpointError, match=r"strange is not in the checkpoint"):
        load_checkpoint(found, other.state(), layout_of(CTX), plain, ranks, lambda text: None)

    renaming = LoadOptions(optimizer=True, rng=True, weights_only=False, new_function=False, renamed=NOW)
    state = other.state(padded_rows={"rows.strange": ODD})
    result = load_checkpoint(found, state, layout_of(CTX), renaming, ranks, lambda text: None)
    assert result.notices == () and result.optimizer_loaded
    assert torch.equal(other.model.rows.strange, run.model.odd)
    old, new = run.optimizer.state[run.model.odd], other.optimizer.state[other.model.rows.strange]
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    options = [[{k: v for k, v in g.items() if k != "params"} for g in t.optimizer.param_groups] for t in (run, other)]
    assert options[0] == options[1]


def test_no_rename_touches_a_name_that_is_in_use() -> None:
    for name in ("decoder.layers.0.mlp.router.weight", "embedding.word_embeddings.weight", "output_layer.weight"):
        assert present_name(name) == name
    for pattern, replacement in RENAMED:
        assert present_name(present_name(replacement)) == present_name(replacement), pattern
