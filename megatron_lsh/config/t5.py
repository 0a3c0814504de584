"""Settings that only T5 has: two stacks of layers, two lengths, span corruption, relative positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config, refuse_gpt_only
from megatron_lsh.config.flag import flag
from megatron_lsh.config.layer_pattern import moe_layer_pattern
from megatron_lsh.config.model import MOST_LAYERS
from megatron_lsh.errors import ConfigError


@dataclass
class T5Settings:
    """Encoder, decoder, span corruption and relative positions of T5. Names are Megatron-LM's where it has them."""

    encoder_num_layers: int | None = flag(
        None, "Layers of the encoder (default: --num-layers)", at_least=1, at_most=MOST_LAYERS
    )
    decoder_num_layers: int | None = flag(
        None, "Layers of the decoder (default: --num-layers)", at_least=1, at_most=MOST_LAYERS
    )
    encoder_seq_length: int | None = flag(None, "Tokens per input sequence (default: --seq-length)", at_least=1)
    decoder_seq_length: int | None = flag(None, "Tokens per output sequence (default: --seq-length)", at_least=1)
    mask_prob: float = flag(0.15, "Share of the tokens that are cut out and predicted", above=0, below=1)
    mean_noise_span_length: float = flag(3.0, "Mean number of tokens of a span that is cut out", at_least=1)
    short_seq_prob: float = flag(
        0.1, "Share of the samples that are made shorter than --encoder-seq-length", at_least=0, at_most=1
    )
    relative_attention_num_buckets: int = flag(
        32, "Distances that --position-embedding-type relative tells apart", at_least=4
    )
    relative_attention_max_distance: int = flag(
        128, "Distance from which on all distances share the last bucket", at_least=2
    )


@dataclass
class T5Config(Config):
    """The configuration of ``pretrain_t5_moe.py``.

    ``model.num_layers`` and ``model.seq_length`` are the encoder's once it is validated; ``t5`` holds both stacks'.
    """

    default_tokenizer: ClassVar[str | None] = "BertWordPieceLowerCase"
    why_no_sample: ClassVar[str | None] = "only a GPT continues a text"
    why_no_pipeline: ClassVar[str | None] = (
        "pipeline parallelism is not implemented for T5, whose decoder reads the encoder's output on every stage"
    )

    why_no_context_parallel: ClassVar[str | None] = (
        "context parallelism is not implemented for T5, whose decoder attends to the encoder's whole output"
    )

    t5: T5Settings = field(default_factory=T5Settings)

    def derive_own(self, check: Checker, world_size: int) -> None:
        super().derive_own(check, world_size)
        derive_t5(self, check)

    def layers_of_stacks(self) -> list[int]:
        encoder, decoder = self.t5.encoder_num_layers, self.t5.decoder_num_layers
        return [] if encoder is None or decoder is None else [encoder, decoder]

    def check_own(self, check: Checker) -> None:
        check_t5(self, check)
        self._check_sample(check)


def derive_t5(cfg: T5Config, check: Checker) -> None:
    """Fill in layers and lengths: --num-layers and --seq-length stand for both stacks, the encoder's stand for them."""
    model, t5 = cfg.model, cfg.t5
    for common, own in (("num_layers", "num_layers"), ("seq_length", "seq_length")):
        if getattr(model, common) is None:
            check.fill(common, getattr(t5, f"encoder_{own}"))
        for stack in ("encoder", "decoder"):
            if getattr(t5, f"{stack}_{own}") is None:
                check.fill(f"{stack}_{own}", getattr(model, common))
    lengths = [length for length in (t5.encoder_seq_length, t5.decoder_seq_length) if length is not None]
    if model.max_position_embeddings is None and lengths:
        check.fill("max_position_embeddings", max(lengths))


def check_t5(cfg: T5Config, check: Checker) -> None:
    """Rules of T5 that single values do not show."""
    for own, common in (("encoder_num_layers", "num_layers"), ("encoder_seq_length", "seq_length")):
        flags = f"--{own.replace('_', '-')} or --{common.replace('_', '-')}"
        check.rule(f"{{{own}}} must be {{{common}}}", lambda a, b: a == b, f"drop {flags}")
    check.rule("{decoder_seq_length} must be at most {max_position_embeddings}", lambda length, most: length <= most)
    if cfg.parallel.sequence_parallel:
        check.rule(
            "{decoder_seq_length} must be divisible by {tensor_model_parallel_size} with sequence parallelism",
            lambda length, tp: length % tp == 0,
        )
    check.rule("{recompute_num_layers} must be at most {decoder_num_layers}", lambda some, all_: some <= all_)
    if cfg.model.position_embedding_type == "relative":
        check.rule(  # half of the buckets are for each direction in the encoder, and half of those for exact distances
            "{relative_attention_num_buckets} must be divisible by 4",
            lambda buckets: buckets % 4 == 0,
        )
        check.rule(
            "{relative_attention_max_distance} must be more than half of {relative_attention_num_buckets}",
            lambda distance, buckets: distance > buckets // 2,
        )
    if cfg.moe.num_experts is not None:
        check.rule(
            "{lsh_start_layer} must be below {encoder_num_layers} plus {decoder_num_layers}: the decoder's layers are "
            "counted after the encoder's",
            lambda start, encoder, decoder: start < encoder + decoder,
            "use --moe-token-dispatcher-type alltoall to run every layer exactly",
        )
    if cfg.moe.num_experts is not None and cfg.t5.decoder_num_layers is not None:
        try:
            moe_layer_pattern(cfg.moe.moe_layer_freq, cfg.t5.decoder_num_layers, "t5.decoder_num_layers")
        except ConfigError as error:
            if str(error) not in check.problems:
                check.problems.append(str(error))
    refuse_gpt_only(check, "T5")
    if cfg.indexed_data:  # as data/samples/t5.py
        for name, least in (("encoder_seq_length", 2), ("decoder_seq_length", 3)):
            check.rule(
                f"{{{name}}} must be at least {least}, or no text fits",
                lambda length, least=least: length >= least,
                f"raise --{name.replace('_', '-')}",
            )
