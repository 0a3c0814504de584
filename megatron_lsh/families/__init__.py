"""The kinds of models that are trained here, each one record; see ``family.py``."""

from __future__ import annotations

from megatron_lsh.config import Config
from megatron_lsh.families.bert import BERT
from megatron_lsh.families.family import Batch, Criterion, Family, Head
from megatron_lsh.families.gpt import GPT
from megatron_lsh.families.losses import Losses, Mean
from megatron_lsh.families.scores import Judge
from megatron_lsh.families.swin import SWIN
from megatron_lsh.families.t5 import T5

__all__ = [
    "BERT",
    "FAMILIES",
    "GPT",
    "SWIN",
    "T5",
    "Batch",
    "Criterion",
    "Family",
    "Head",
    "Judge",
    "Losses",
    "Mean",
    "family_of",
]

FAMILIES = (GPT, BERT, T5, SWIN)


def family_of(cfg: Config) -> Family:
    """The family whose flags these are; of a configuration of fine-tuning, the classifiers of a family."""
    known = {family.config: family for each in FAMILIES for family in (each, each.classifier) if family is not None}
    return next(known[kind] for kind in type(cfg).__mro__ if kind in known)
