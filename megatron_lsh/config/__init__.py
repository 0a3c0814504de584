"""Settings of a run: dataclasses, the command line made from them, checks, and what is saved of them."""

from megatron_lsh.config.arguments import parse_args
from megatron_lsh.config.bert import BertConfig, BertSettings
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.config.classification import ClassificationConfig, ClassificationSettings, parse_classification_args
from megatron_lsh.config.config import Config, required
from megatron_lsh.config.data import DataConfig
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.config.logging import LoggingConfig
from megatron_lsh.config.model import ModelConfig
from megatron_lsh.config.moe import LSHConfig, MoEConfig
from megatron_lsh.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_lsh.config.serialize import describe, from_dict, to_dict, to_json, to_saved
from megatron_lsh.config.t5 import T5Config, T5Settings
from megatron_lsh.config.training import OptimizerConfig, TrainingConfig
from megatron_lsh.config.validate import assumed_world_size, check_model, validate
from megatron_lsh.config.vocab import padded_vocab_size

__all__ = [
    "BertConfig",
    "BertSettings",
    "CheckpointConfig",
    "ClassificationConfig",
    "ClassificationSettings",
    "Config",
    "DataConfig",
    "LSHConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "T5Config",
    "T5Settings",
    "TrainingConfig",
    "assumed_world_size",
    "check_model",
    "describe",
    "from_dict",
    "moe_layer_pattern",
    "padded_vocab_size",
    "parse_args",
    "parse_classification_args",
    "required",
    "to_dict",
    "to_json",
    "to_saved",
    "validate",
]
