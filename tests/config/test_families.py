"""The configurations of BERT and T5: what follows from what, and every rule with the line a user sees."""

from __future__ import annotations

import json

import pytest

from megatron_lsh.config import BertConfig, Config, T5Config, from_dict, parse_args, to_json, validate
from megatron_lsh.errors import ConfigError

BASE = "--hidden-size 32 --num-attention-heads 4 --micro-batch-size 2 --mock-data --lr 1e-3 --train-iters 3 "
GPT = BASE + "--num-layers 2 --seq-length 64 "


def lines(flags: str, config_class: type[Config], world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(parse_args(flags.split(), config_class), world_size)
    return str(error.value).splitlines()


def test_common_sizes_stand_for_both_stacks() -> None:
    cfg = validate(parse_args((GPT + "--decoder-num-layers 3 --decoder-seq-length 16").split(), T5Config), 1)
    sizes = (cfg.t5.encoder_num_layers, cfg.t5.decoder_num_layers, cfg.t5.encoder_seq_length, cfg.t5.decoder_seq_length)
    assert sizes == (2, 3, 64, 16)
    assert cfg.model.max_position_embeddings == 64


def test_the_encoders_sizes_are_the_common_ones() -> None:
    flags = "--encoder-num-layers 2 --decoder-num-layers 3 --encoder-seq-length 64 --decoder-seq-length 128"
    cfg = validate(parse_args((BASE + flags).split(), T5Config), 1)
    assert (cfg.model.num_layers, cfg.model.seq_length, cfg.model.max_position_embeddings) == (2, 64, 128)
    assert validate(cfg, 1) == cfg
    again = from_dict(json.loads(to_json(cfg)), T5Config)
    assert again == cfg and again.derived == cfg.derived


def test_bert_has_its_own_flags() -> None:
    cfg = validate(parse_args((GPT + "--bert-no-binary-head --mask-prob 0.2").split(), BertConfig), 1)
    assert (cfg.bert.bert_binary_head, cfg.bert.mask_prob, cfg.bert.short_seq_prob) == (False, 0.2, 0.1)


@pytest.mark.parametrize(
    ("flags", "config_class", "line"),
    [
        (
            "--encoder-num-layers 5",
            T5Config,
            "t5.encoder_num_layers (5) must be model.num_layers (2): drop --encoder-num-layers or --num-layers",
        ),
        (
            "--encoder-seq-length 32",
            T5Config,
            "t5.encoder_seq_length (32) must be model.seq_length (64): drop --encoder-seq-length or --seq-length",
        ),
        (
            "--decoder-seq-length 128 --max-position-embeddings 64",
            T5Config,
            "t5.decoder_seq_length (128) must be at most model.max_position_embeddings (64): change --decoder-seq-length or "
            "--max-position-embeddings",
        ),
        (
            "--decoder-num-layers 1 --recompute-granularity full --recompute-num-layers 2",
            T5Config,
            "recompute.recompute_num_layers (2) must be at most t5.decoder_num_layers (1): change --recompute-num-layers or "
            "--decoder-num-layers",
        ),
        (
            "--decoder-num-layers 1 --num-experts 4 --lsh-start-layer 3",
            T5Config,
            "lsh.lsh_start_layer (3) must be below t5.encoder_num_layers (2) plus t5.decoder_num_layers (1): the decoder's "
            "layers are counted after the encoder's: use --moe-token-dispatcher-type alltoall to run every layer exactly",
        ),
        (
            "--decoder-num-layers 4 --num-experts 4 --moe-layer-freq [0,1]",
            T5Config,
            "moe.moe_layer_freq ([0,1]) has 2 entries and must have one per layer, t5.decoder_num_layers (4): change "
            "--moe-layer-freq or --decoder-num-layers",
        ),
        (
            "--position-embedding-type relative --relative-attention-num-buckets 6",
            T5Config,
            "t5.relative_attention_num_buckets (6) must be divisible by 4: change --relative-attention-num-buckets",
        ),
        (
            "--position-embedding-type relative --relative-attention-max-distance 16",
            T5Config,
            "t5.relative_attention_max_distance (16) must be more than half of t5.relative_attention_num_buckets (32): "
            "change --relative-attention-max-distance or --relative-attention-num-buckets",
        ),
        ("--mask-prob 1", T5Config, "t5.mask_prob (1.0) must be above 0 and below 1: change --mask-prob"),
        ("--mask-prob 0", BertConfig, "bert.mask_prob (0.0) must be above 0 and below 1: change --mask-prob"),
        (
            "--mean-noise-span-length 0.5",
            T5Config,
            "t5.mean_noise_span_length (0.5) must be at least 1: change --mean-noise-span-length",
        ),
        (
            "--decoder-seq-length 2",
            T5Config,
            "t5.decoder_seq_length (2) must be at least 3, or no text fits: raise --decoder-seq-length",
        ),
        (
            "--seq-length 4",
            BertConfig,
            "model.seq_length (4) must be at least 5, which [CLS], [SEP] and two tokens take: raise --seq-length",
        ),
        (
            "--position-embedding-type relative",
            BertConfig,
            "model.position_embedding_type (relative) must not be relative, which only T5 has: set "
            "--position-embedding-type learned_absolute, rope or none",
        ),
        (
            "--position-embedding-type relative",
            Config,
            "model.position_embedding_type (relative) must not be relative, which only T5 has: set "
            "--position-embedding-type learned_absolute, rope or none",
        ),
        (
            "--reset-position-ids",
            BertConfig,
            "data.reset_position_ids (True) must be off with BERT, whose samples do not run over the ends of documents: "
            "drop --reset-position-ids",
        ),
        (
            "--sample-prompt def",
            T5Config,
            "logging.sample_prompt (def) must not be given: only a GPT continues a text: drop --sample-prompt",
        ),
        (
            "--encoder-num-layers 2",
            Config,
            "--encoder-num-layers is Megatron-LM's and not supported here: a flag of pretrain_t5_moe.py; other models take "
            "--num-layers and --seq-length",
        ),
        (
            "--bert-no-binary-head",
            T5Config,
            "--bert-no-binary-head is Megatron-LM's and not supported here: a flag of pretrain_bert_moe.py",
        ),
    ],
)
def test_rules(flags: str, config_class: type[Config], line: str) -> None:
    assert lines(GPT + flags, config_class) == [line]


def test_both_lengths_are_cut() -> None:
    flags = GPT + "--decoder-seq-length 30 --tensor-model-parallel-size 4 --num-experts 4"
    assert lines(flags, T5Config, world_size=4) == [
        "t5.decoder_seq_length (30) must be divisible by parallel.tensor_model_parallel_size (4) with sequence parallelism: "
        "change --decoder-seq-length or --tensor-model-parallel-size"
    ]
