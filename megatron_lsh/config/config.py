"""``Config``: all settings of a run, one dataclass per concern."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.data import DataConfig
from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_lsh.config.training import OptimizerConfig, TrainingConfig


@dataclass
class Config:
    """Everything that describes a run. Rooms receive the part they need, never the whole.

    An entry script whose model needs further flags declares a dataclass of them and a subclass of Config with one more
    part (see ``bert.py``), and passes the subclass to :func:`parse_args`.
    """

    indexed_data: ClassVar[bool] = True
    """whether samples come from --data-path or --mock-data, and not from files of the entry script's own"""

    default_tokenizer: ClassVar[str | None] = "GPT2BPETokenizer"
    """--tokenizer-type where only --vocab-file is given, as in Megatron-LM's script for this model"""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    lsh: LSHConfig = field(default_factory=LSHConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    # Not settings. What validate() filled in (field name -> value), so that it can be told from what the user gave:
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    # One line each, to be printed once (by one rank) at start-up: flags without effect, settings changed on the way.
    notices: list[str] = field(default_factory=list, repr=False, compare=False)


def required(value: int | None) -> int:
    """A setting that ``validate`` made sure of."""
    if value is None:
        raise ValueError("the configuration was not validated")
    return value
