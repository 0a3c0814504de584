"""Sharded checkpoints that survive crashes, full disks, flipped bits and a change of layout."""

from __future__ import annotations

from megatron_lsh.checkpoint.inspection import CheckpointInfo, inspect
from megatron_lsh.checkpoint.lock import SaveLock
from megatron_lsh.checkpoint.manager import CheckpointManager
from megatron_lsh.checkpoint.soundness import Standing
from megatron_lsh.checkpoint.state import LoadResult, TrainingState

__all__ = ["CheckpointInfo", "CheckpointManager", "LoadResult", "SaveLock", "Standing", "TrainingState", "inspect"]
