"""``Config``: all settings of a run, one dataclass per concern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.data import DataConfig
from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_lsh.config.training import OptimizerConfig, TrainingConfig


@dataclass
class Config:
    """Everything that describes a run. Who computes gets the part that it needs: a layer its sections, a model all of them.

    An entry script whose model needs further flags declares a dataclass of them and a subclass of Config with one more
    part (see ``bert.py``), and passes the subclass to :func:`parse_args`.
    """

    indexed_data: ClassVar[bool] = True
    """whether samples come from --data-path or --mock-data, and not from files of the entry script's own"""

    tokenized: ClassVar[bool] = True
    """whether samples are text, and a tokenizer must be named"""

    why_no_sample: ClassVar[str | None] = None
    """why --sample-prompt is refused; None for a model that continues a text"""

    why_no_pipeline: ClassVar[str | None] = None
    """why --pipeline-model-parallel-size must be 1; None for a model that stages can run"""

    why_no_context_parallel: ClassVar[str | None] = None
    """why --context-parallel-size must be 1; None for a model whose sequences ranks can share"""

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

    def layers_of_stacks(self) -> list[int]:
        """Layers of each of the model's stacks, in the order in which they are numbered; empty until they are known."""
        return [] if self.model.num_layers is None else [self.model.num_layers]

    @classmethod
    def preset(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings (name -> value) that hold where none of `values`, which were given, says otherwise."""
        return {}

    def derive_own(self, check: Checker, world_size: int) -> None:
        """Fill in what the rest of the configuration is derived from, where a kind of model has such settings."""

    def check_own(self, check: Checker) -> None:
        """The rules of one kind of model, and the absence of what other kinds have. Here: of a GPT."""
        refuse_relative_positions(check)
        self._check_start_layer(check)
        self._check_sample(check)

    def _check_start_layer(self, check: Checker) -> None:
        if self.moe.num_experts is not None:
            check.rule(
                "{lsh_start_layer} must be below {num_layers}",
                lambda start, layers: start < layers,
                "use --moe-token-dispatcher-type alltoall to run every layer exactly",
            )

    def _check_sample(self, check: Checker) -> None:
        if self.why_no_sample is not None:
            check.rule(
                f"{{sample_prompt}} must not be given: {self.why_no_sample}", lambda _: False, "drop --sample-prompt"
            )


def refuse_relative_positions(check: Checker) -> None:
    """Relative position buckets need the bias table that only T5 has."""
    check.rule(
        "{position_embedding_type} must not be relative, which only T5 has",
        lambda kind: kind != "relative",
        "set --position-embedding-type learned_absolute, rope or none",
    )


def refuse_gpt_only(check: Checker, model: str) -> None:
    """Switches of the samples that only a GPT is trained on, and what reads GPT checkpoints only."""
    for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        check.rule(
            f"{{{name}}} must be off with {model}, whose samples do not run over the ends of documents",
            lambda on: not on,
            f"drop --{name.replace('_', '-')}",
        )
    check.rule(
        f"{{moe_use_upcycling}} must be off with {model}: only GPT checkpoints are converted",
        lambda on: not on,
        "drop --moe-use-upcycling",
    )


def required(value: int | None) -> int:
    """A setting that ``validate`` made sure of."""
    if value is None:
        raise ValueError("the configuration was not validated")
    return value
