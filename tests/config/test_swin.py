"""Swin's configuration: presets and what wins over them, published sizes, and every rule with the line a user sees."""

from __future__ import annotations

import json

import pytest

from megatron_lsh.config import from_dict, parse_args, to_json, validate
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.plan.dry_run import dry_run

RUN = "--micro-batch-size 2 --lr 1e-3 --train-iters 3 --data-path pictures "

# Millions of parameters with 21,841 classes: table 11 of arXiv:2206.03382.
PUBLISHED = {
    "s1": "65.8", "s8": "173.3", "s16": "296.1", "s32": "541.8", "s64": "1033", "s128": "2016",
    "b1": "109.3", "b8": "300.3", "b16": "518.7", "b32": "955.3",
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(size: str) -> None:
    flags = f"--preset swin-moe-{size} --dry-run --micro-batch-size 1"
    cfg = validate(parse_args(flags.split(), SwinConfig), 1)
    text = dry_run(cfg)
    cfg.training.dry_run_json = True
    total = json.loads(dry_run(cfg))["parameters"]["total"]
    digits = 0 if "." not in PUBLISHED[size] else 1
    assert f"{total / 1e6:.{digits}f}" == PUBLISHED[size]
    assert f"total     {total:>18,}" in text


def test_what_is_given_wins_over_a_preset() -> None:
    cfg = parse_args(
        ["--preset", "swin-moe-b32", "--moe-router-topk", "2", "--num-classes", "10", "--moe-router-gate-noise", "0.5"],
        SwinConfig,
    )
    assert (cfg.moe.num_experts, cfg.model.hidden_size, cfg.swin.swin_depths) == (32, 128, [2, 2, 18, 2])
    assert (cfg.moe.moe_router_topk, cfg.swin.num_classes, cfg.moe.moe_router_gate_noise) == (2, 10, 0.5)
    assert cfg.moe.moe_router_pre_softmax and cfg.swin.img_h == 192 and not cfg.model.add_bias_fc2


def test_what_follows_from_what() -> None:
    flags = RUN + "--img-h 20 --patch-dim 3 --swin-depths 1 2 3 --hidden-size 64 --num-experts 4"
    cfg = validate(parse_args(flags.split(), SwinConfig), 1)
    assert (cfg.swin.img_w, cfg.model.num_layers, cfg.model.num_attention_heads, cfg.model.seq_length) == (20, 6, 2, 49)
    assert cfg.heads() == [2, 4, 8] and cfg.moe.moe_layer_freq == "[0,0,1,0,1,0]" and cfg.moe.moe_router_pre_softmax
    assert cfg.layers_of_stacks() == [1, 2, 3]
    assert validate(cfg, 1) == cfg
    again = from_dict(json.loads(to_json(cfg)), SwinConfig)
    assert again == cfg and validate(again, 1) == cfg


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--swin-num-heads 3 6",
            "swin.swin_num_heads ([3, 6]) must be one number for each of the stages in swin.swin_depths ([2, 2, 6, 2]): "
            "change --swin-num-heads or --swin-depths",
        ),
        (
            "--hidden-size 100 --num-attention-heads 3",
            "model.hidden_size (100) must be divisible by model.num_attention_heads (3): change --hidden-size or "
            "--num-attention-heads",
        ),
        (
            "--mixup 0.8 --micro-batch-size 3",
            "training.micro_batch_size (3) must be even with mixup and cutmix, which mix pictures in pairs: change "
            "--micro-batch-size, or set --mixup 0 --cutmix 0",
        ),
        ("--num-channels 2", "swin.num_channels (2) must be 1 or 3: change --num-channels"),
        (
            "--crop-scale 0.5 0.1",
            "images.crop_scale ([0.5, 0.1]) must be two numbers, the smaller one first: change --crop-scale",
        ),
        (
            "--image-mean 0.5 0.5",
            "images.image_mean ([0.5, 0.5]) must be one number, or one for each of swin.num_channels (3): change --image-mean "  # noqa: E501
            "or --num-channels",
        ),
        (
            "--num-experts 4 --moe-router-load-balancing-type load_importance",
            "moe.moe_router_gate_noise (0.0) must be above 0 with moe.moe_router_load_balancing_type (load_importance), which "  # noqa: E501
            "divides by it: change --moe-router-gate-noise or --moe-router-load-balancing-type",
        ),
        ("--epochs 2", "images.epochs (2) and training.train_iters (3) must not both be given: drop one of them"),
        ("--freeze-experts", "swin.freeze_experts (True) must be off without experts: set --num-experts or drop it"),
        (
            "--num-layers 3",
            "model.num_layers (3) must be 12, the sum of swin.swin_depths ([2, 2, 6, 2]): drop --num-layers",
        ),
        (
            "--swin-position-bias table --swin-pretrained-window-size 7",
            "swin.swin_pretrained_window_size ([7]) must not be given with swin.swin_position_bias (table): drop it: a table "  # noqa: E501
            "holds one bias per distance, and has no window that it was scaled by",
        ),
        ("--data-path a b", "data.data_path (['a', 'b']) must be one folder, or hf:NAME: change --data-path"),
        (
            "--sample-prompt x",
            "logging.sample_prompt (x) must not be given: only a GPT continues a text: drop --sample-prompt",
        ),
    ],
)
def test_rules(flags: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(parse_args((RUN + flags).split(), SwinConfig), 1)
    assert str(error.value).splitlines() == [line]
