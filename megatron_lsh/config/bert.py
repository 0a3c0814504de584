"""Settings that only BERT and RoBERTa have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config, refuse_gpt_only
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
    why_no_sample: ClassVar[str | None] = "only a GPT continues a text"
    why_no_context_parallel: ClassVar[str | None] = (
        "context parallelism is not implemented for BERT, whose positions attend to later ones"
    )

    bert: BertSettings = field(default_factory=BertSettings)

    def check_own(self, check: Checker) -> None:
        super().check_own(check)
        refuse_gpt_only(check, "BERT")
        if self.indexed_data:  # as data/samples/bert.py, which a program may use by itself
            least = 5 if self.bert.bert_binary_head else 4
            check.rule(
                f"{{seq_length}} must be at least {least}, which [CLS], [SEP] and two tokens take",
                lambda length: length >= least,
                "raise --seq-length",
            )
