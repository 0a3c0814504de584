"""Settings that only BERT and RoBERTa have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config
from megatron_lsh.config.flag import flag


@dataclass
class BertSettings:
    """Masked-language-model samples and heads of BERT. Names, defaults and meaning are Megatron-LM's."""

    mask_prob: float = flag(0.15, "Share of the tokens that are masked and predicted", above=0, below=1)
    short_seq_prob: float = flag(
        0.1, "Share of the samples that are made shorter than --seq-length", at_least=0, at_most=1
    )
    bert_binary_head: bool = flag(
        True,
        "Second segment and sentence-order loss (without them: RoBERTa)",
        off="--bert-no-binary-head",
    )


@dataclass
class BertConfig(Config):
    """The configuration of ``pretrain_bert_moe.py``."""

    default_tokenizer: ClassVar[str | None] = "BertWordPieceLowerCase"

    bert: BertSettings = field(default_factory=BertSettings)


def check_bert(cfg: BertConfig, check: Checker) -> None:
    """Rules of BERT that single values do not show."""
    refuse_relative_positions(check)
    refuse_gpt_only(check, "BERT")


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
