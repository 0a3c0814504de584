"""validate: what follows from what. Its rules are in test_rules.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.config import Config, assumed_world_size, from_dict, parse_args, to_json, validate
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import DENSE, MIXTRAL, SMALL, lines_for, small, without

# --- the Mixtral command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [32, 64])
def test_mixtral_is_valid_as_it_stands(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = validate(parse_args(MIXTRAL), world)
    # 8 of 32 layers on each of 4 ranks, and 8 at a time: one chunk, plain 1F1B, as in Megatron-LM.
    assert Stages.from_config(cfg.parallel) == Stages(4, 1)


@pytest.mark.parametrize("keep_virtual_stages", [False, True])
def test_mixtral_without_pipeline_is_valid_for_32_ranks(
    keep_virtual_stages: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*MIXTRAL, "--pipeline-model-parallel-size", "1"]
    if not keep_virtual_stages:
        at = words.index("--num-layers-per-virtual-pipeline-stage")
        del words[at : at + 2]
    cfg = validate(parse_args(words), 32)
    assert cfg.model.kv_channels == 128 and cfg.moe.moe_ffn_hidden_size == 14336
    assert not cfg.parallel.sequence_parallel
    stages = (
        ["no effect with one pipeline stage: --num-layers-per-virtual-pipeline-stage"] if keep_virtual_stages else []
    )
    assert cfg.notices[1:] == ["no effect with --tensor-model-parallel-size 1: --sequence-parallel", *stages]
    assert (tmp_path / "S").is_dir() and (tmp_path / "TB").is_dir()


# --- what follows from what ----------------------------------------------------------------------------------------


def test_derived_defaults() -> None:
    cfg = small(world_size=4)
    model = cfg.model
    assert (model.ffn_hidden_size, model.kv_channels, model.num_query_groups) == (256, 16, 4)
    assert model.max_position_embeddings == 32 and cfg.moe.moe_ffn_hidden_size == 256
    assert cfg.training.global_batch_size == 8 and cfg.optimizer.lr_decay_iters == 10
    assert cfg.optimizer.start_weight_decay == cfg.optimizer.end_weight_decay == 0.01
    assert cfg.parallel.expert_tensor_parallel_size == 1 and cfg.data.split == "969,30,1"
    assert cfg.notices == []


def test_what_is_given_is_not_derived() -> None:
    flags = "--ffn-hidden-size 96 --kv-channels 32 --max-position-embeddings 64 --moe-ffn-hidden-size 48 --split 1,0,0"
    cfg = small(flags + " --global-batch-size 12 --lr-decay-iters 7 --group-query-attention --num-query-groups 2", 2)
    assert (cfg.model.ffn_hidden_size, cfg.model.kv_channels, cfg.model.num_query_groups) == (96, 32, 2)
    assert (cfg.model.max_position_embeddings, cfg.moe.moe_ffn_hidden_size, cfg.data.split) == (64, 48, "1,0,0")
    assert (cfg.training.global_batch_size, cfg.optimizer.lr_decay_iters) == (12, 7)
    assert set(cfg.derived) == {"expert_tensor_parallel_size", "start_weight_decay", "end_weight_decay"}


@pytest.mark.parametrize(("hidden", "ffn"), [(64, 128), (512, 1344), (4096, 10880)])
def test_default_width_of_swiglu(hidden: int, ffn: int) -> None:
    assert small(f"--swiglu --hidden-size {hidden}").model.ffn_hidden_size == ffn


def test_too_narrow_for_the_default_width() -> None:
    assert lines_for("--swiglu --hidden-size 16") == [
        "model.ffn_hidden_size (0) must be at least 1: set --ffn-hidden-size"
    ]


def test_samples_become_iterations() -> None:
    cfg = validate(parse_args([*without("--train-iters"), "--train-samples", "50"]), 2)
    assert cfg.training.train_iters == 12 and cfg.optimizer.lr_decay_samples == 50
    assert cfg.optimizer.lr_decay_iters is None
    assert validate(cfg, 1).training.train_iters == 25


def test_tensor_parallel_moe_turns_sequence_parallel_on() -> None:
    cfg = small("--tensor-model-parallel-size 2", 2)
    assert cfg.parallel.sequence_parallel and cfg.parallel.expert_tensor_parallel_size == 1
    assert cfg.notices == [
        "--sequence-parallel is turned on: MoE with tensor parallelism needs it",
        "experts are not cut over tensor-parallel ranks: --expert-tensor-parallel-size is 1 (Megatron-LM: 2, the "
        "tensor-parallel size)",
    ]
    quiet = small("--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1", 2)
    assert quiet.parallel.sequence_parallel and quiet.notices == []
    dense = validate(parse_args([*DENSE, "--tensor-model-parallel-size", "2"]), 2)
    assert not dense.parallel.sequence_parallel and dense.notices == []


@pytest.mark.parametrize(
    ("flags", "granularity", "modules", "method", "layers"),
    [
        ("", None, ["core_attn"], None, None),
        ("--recompute-activations", "selective", ["core_attn"], None, None),
        ("--recompute-granularity selective --recompute-modules mlp moe", "selective", ["mlp", "moe"], None, None),
        ("--moe-layer-recompute", "selective", ["moe"], None, None),
        ("--moe-layer-recompute --recompute-activations", "selective", ["core_attn", "moe"], None, None),
        ("--recompute-granularity full", "full", ["core_attn"], "uniform", 1),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
            "full",
            ["core_attn"],
            "block",
            3,
        ),
    ],
)
def test_recomputation(
    flags: str, granularity: str, modules: list[str], method: str | None, layers: int | None
) -> None:
    recompute = small(flags).recompute
    assert recompute.recompute_granularity == granularity and recompute.recompute_modules == modules
    assert (recompute.recompute_method, recompute.recompute_num_layers) == (method, layers)


@pytest.mark.parametrize(
    ("flags", "notice"),
    [
        ("--num-query-groups 2", "no effect without --group-query-attention: --num-query-groups 2"),
        ("--recompute-modules moe", "no effect without --recompute-granularity selective: --recompute-modules"),
        ("--save-interval 5", "no effect without --save: --save-interval"),
        ("--async-save --no-save-optim", "no effect without --save: --async-save, --no-save-optim"),
        ("--no-load-rng", "no effect without --load: --no-load-rng"),
        ("--world-size 8", "no effect without --dry-run: --world-size"),
        ("--loss-scale 128 --hysteresis 3", "no effect without --fp16: --loss-scale, --hysteresis"),
        (
            "--fp16 --loss-scale 128 --initial-loss-scale 4",
            "no effect beside --loss-scale, which is fixed: --initial-loss-scale",
        ),
        ("--lr-wsd-decay-iters 3", "no effect without --lr-decay-style WSD: --lr-wsd-decay-iters"),
        (
            "--moe-aux-loss-coeff 0",
            "nothing balances the experts: set --moe-aux-loss-coeff (1e-2 is usual) or --moe-router-enable-expert-bias",
        ),
    ],
)
def test_surprises_are_told(flags: str, notice: str) -> None:
    assert small(flags).notices == [notice]


def test_dispatcher_without_experts_is_told() -> None:
    cfg = validate(parse_args([*DENSE, "--moe-token-dispatcher-type", "lsh"]), 1)
    assert cfg.notices == ["no effect without --num-experts: --moe-token-dispatcher-type"]


def test_plug_in_dispatchers_pass() -> None:
    assert small("--moe-token-dispatcher-type my_package:factory").moe.moe_token_dispatcher_type == "my_package:factory"


# --- validate as a function ------------------------------------------------------------------------------------------


def test_the_argument_is_not_changed() -> None:
    cfg = parse_args(SMALL)
    before = copy.deepcopy(cfg)
    validate(cfg, 2)
    assert cfg == before and cfg.derived == {} and cfg.notices == []


@settings(deadline=None, max_examples=30)
@given(
    tp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 8]),
    first=st.sampled_from([8, 16]),
    second=st.sampled_from([8, 24]),
    flags=st.lists(
        st.sampled_from(
            ["--swiglu", "--recompute-activations", "--moe-layer-recompute", "--bf16", "--disable-bias-linear"]
        )
    ),
)
def test_validating_again_is_as_validating_once(tp: int, ep: int, first: int, second: int, flags: list[str]) -> None:
    words = [*SMALL, "--tensor-model-parallel-size", str(tp), "--expert-model-parallel-size", str(ep), *flags]
    once = validate(parse_args(words), second)
    again = validate(validate(parse_args(words), first), second)
    loaded = validate(from_dict(json.loads(to_json(validate(parse_args(words), first)))), second)
    assert once == again == loaded
    assert once.derived == again.derived == loaded.derived
    assert once.notices == again.notices


def test_values_changed_after_validation_are_kept() -> None:
    cfg = small()
    cfg.model.ffn_hidden_size = 96
    assert validate(cfg, 1).model.ffn_hidden_size == 96


def test_configurations_made_in_code_are_checked_alike() -> None:
    cfg = parse_args(SMALL)
    cfg.model.num_layers = "4"  # type: ignore[assignment]
    cfg.optimizer.lr = 1
    assert validate(cfg, 1).model.num_layers == 4
    assert type(validate(cfg, 1).optimizer.lr) is float
    cfg.model.normalization = "BatchNorm"
    cfg.training.seed = None  # type: ignore[assignment]
    cfg.data.num_workers = 1.5  # type: ignore[assignment]
    with pytest.raises(ConfigError) as error:
        validate(cfg, 1)
    assert str(error.value).splitlines() == [
        "model.normalization (BatchNorm) must be one of LayerNorm, RMSNorm: change --normalization",
        "training.seed (absent) must have a value: change --seed",
        "data.num_workers (1.5) must be an integer: change --num-workers",
    ]


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [({}, "", 1), ({"WORLD_SIZE": "6"}, "", 6), ({"WORLD_SIZE": "6"}, "--dry-run --world-size 32", 32)],
)
def test_assumed_world_size(
    environment: dict[str, str], flags: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert assumed_world_size(parse_args(flags.split())) == expected


def test_world_size_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE \(many\) must be a number"):
        assumed_world_size(Config())
    with pytest.raises(ConfigError, match=r"world size \(0\) must be at least 1"):
        validate(parse_args(SMALL), 0)
