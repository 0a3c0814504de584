"""validate: what follows from what, and every rule with the line a user sees."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.config import Config, assumed_world_size, from_json, parse_args, to_json, validate
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import MIXTRAL, SMALL, small

DENSE = [word for word in SMALL if word not in ("--num-experts", "8", "--moe-aux-loss-coeff", "0.01")]


def lines_for(flags: str, world_size: int = 1, base: list[str] = SMALL) -> list[str]:
    cfg = parse_args([*base, *flags.split()])
    with pytest.raises(ConfigError) as error:
        validate(cfg, world_size)
    return str(error.value).splitlines()


# --- the Mixtral command line --------------------------------------------------------------------------------------


def test_mixtral_is_refused_only_for_its_pipeline() -> None:
    assert lines_for("", 32, MIXTRAL) == [
        "parallel.pipeline_model_parallel_size (4) must be 1, because pipeline parallelism is not implemented: set "
        "--pipeline-model-parallel-size 1, and use --expert-model-parallel-size and --tensor-model-parallel-size"
    ]


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
    cfg = validate(parse_args([*_without("--train-iters"), "--train-samples", "50"]), 2)
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
        ("--world-size 8", "no effect without --dry-run: --world-size"),
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
    loaded = validate(from_json(to_json(validate(parse_args(words), first))), second)
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


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "world_size", "line"),
    [
        # single values
        ("--num-layers 0", 1, "model.num_layers (0) must be at least 1: change --num-layers"),
        ("--lsh-num-hashes 0", 1, "lsh.lsh_num_hashes (0) must be at least 1: change --lsh-num-hashes"),
        ("--lsh-hash-width 0", 1, "lsh.lsh_hash_width (0) must be at least 1: change --lsh-hash-width"),
        ("--lsh-residual some", 1, "lsh.lsh_residual (some) must be one of none, identity: change --lsh-residual"),
        ("--hidden-dropout 1", 1, "model.hidden_dropout (1.0) must be at least 0 and below 1: change --hidden-dropout"),
        ("--rotary-percent 0", 1, "model.rotary_percent (0.0) must be above 0 and at most 1: change --rotary-percent"),
        (
            "--moe-expert-capacity-factor 0",
            1,
            "moe.moe_expert_capacity_factor (0.0) must be above 0: change --moe-expert-capacity-factor",
        ),
        (
            "--recompute-granularity selective --recompute-modules mlp attn",
            1,
            "recompute.recompute_modules (['mlp', 'attn']) must be one of core_attn, moe, mlp, layernorm: change "
            "--recompute-modules",
        ),
        # the model
        (
            "--hidden-size 66",
            1,
            "model.hidden_size (66) must be divisible by model.num_attention_heads (4): change --hidden-size or "
            "--num-attention-heads",
        ),
        (
            "--group-query-attention --num-query-groups 3",
            1,
            "model.num_attention_heads (4) must be divisible by model.num_query_groups (3): change "
            "--num-attention-heads or --num-query-groups",
        ),
        (
            "--max-position-embeddings 31",
            1,
            "model.seq_length (32) must be at most model.max_position_embeddings (31): change --seq-length or "
            "--max-position-embeddings",
        ),
        (
            "--position-embedding-type rope --kv-channels 5",
            1,
            "model.kv_channels (5) times model.rotary_percent (1.0) must be at least 2 and even, because rope turns "
            "channels in pairs: change --kv-channels or --rotary-percent",
        ),
        (
            "--no-position-embedding",
            1,
            "model.add_position_embedding (False) must be on with model.position_embedding_type (learned_absolute): drop "
            "--no-position-embedding, or use --position-embedding-type rope or none",
        ),
        # mixture of experts
        (
            "--num-experts 63 --expert-model-parallel-size 8",
            8,
            "moe.num_experts (63) must be divisible by parallel.expert_model_parallel_size (8): change --num-experts or "
            "--expert-model-parallel-size",
        ),
        (
            "--moe-router-topk 9",
            1,
            "moe.moe_router_topk (9) must be at most moe.num_experts (8): change --moe-router-topk or --num-experts",
        ),
        (
            "--moe-router-topk 1",
            1,
            "moe.moe_router_topk (1) must be at least 2 with moe.moe_router_score_function (softmax) scores after the top-k "
            "(moe.moe_router_pre_softmax (False)): set --moe-router-pre-softmax or --moe-router-score-function sigmoid",
        ),
        (
            "--moe-router-enable-expert-bias",
            1,
            "moe.moe_router_enable_expert_bias (True) must be off with moe.moe_router_score_function (softmax): set "
            "--moe-router-score-function sigmoid",
        ),
        (
            "--moe-router-score-function sigmoid --moe-router-pre-softmax",
            1,
            "moe.moe_router_pre_softmax (True) must be off with moe.moe_router_score_function (sigmoid): drop "
            "--moe-router-pre-softmax",
        ),
        (
            "--moe-shared-expert-gate",
            1,
            "moe.moe_shared_expert_gate (True) must be off without a shared expert: set "
            "--moe-shared-expert-intermediate-size",
        ),
        (
            "--moe-layer-freq [0]*3",
            1,
            "moe.moe_layer_freq ([0]*3) has 3 entries and must have one per layer, model.num_layers (4): change "
            "--moe-layer-freq or --num-layers",
        ),
        (
            "--moe-layer-freq [0]*4",
            1,
            "moe.moe_layer_freq ([0]*4) must make at least one layer an MoE layer: change --moe-layer-freq",
        ),
        (
            "--moe-layer-freq exit()",
            1,
            "moe.moe_layer_freq (exit()) must be an integer or a list such as ([0]*3+[1]*58): change --moe-layer-freq",
        ),
        (
            "--moe-token-dispatcher-type flex",
            1,
            "moe.moe_token_dispatcher_type (flex) is not supported here: DeepEP is not implemented; use alltoall (exact) "
            "or lsh (compressed)",
        ),
        # the layout
        (
            "--tensor-model-parallel-size 2",
            3,
            "world size (3) must be divisible by parallel.tensor_model_parallel_size (2): change "
            "--tensor-model-parallel-size or the number of ranks",
        ),
        (
            "--expert-model-parallel-size 4",
            6,
            "world size (6) must be divisible by parallel.expert_model_parallel_size (4): change "
            "--expert-model-parallel-size or the number of ranks",
        ),
        (
            "--tensor-model-parallel-size 8 --kv-channels 16",
            8,
            "model.num_attention_heads (4) must be divisible by parallel.tensor_model_parallel_size (8): change "
            "--num-attention-heads or --tensor-model-parallel-size",
        ),
        (
            "--tensor-model-parallel-size 2 --group-query-attention --num-query-groups 1",
            2,
            "model.num_query_groups (1) must be divisible by parallel.tensor_model_parallel_size (2): change "
            "--num-query-groups or --tensor-model-parallel-size",
        ),
        (
            "--tensor-model-parallel-size 2 --seq-length 33",
            2,
            "model.seq_length (33) must be divisible by parallel.tensor_model_parallel_size (2) with sequence parallelism: "
            "change --seq-length or --tensor-model-parallel-size",
        ),
        (
            "--tensor-model-parallel-size 2 --ffn-hidden-size 33 --moe-layer-freq 2",
            2,
            "model.ffn_hidden_size (33) must be divisible by parallel.tensor_model_parallel_size (2): change "
            "--ffn-hidden-size or --tensor-model-parallel-size",
        ),
        (
            "--distributed-backend nccl --device cpu",
            1,
            "parallel.distributed_backend (nccl) must be gloo on parallel.device (cpu): change --distributed-backend or "
            "--device",
        ),
        # batch and length
        (
            "--global-batch-size 10",
            4,
            "training.global_batch_size (10) must be divisible by training.micro_batch_size (2) times the data-parallel "
            "size (4 = world size 4 / parallel.tensor_model_parallel_size (1)): change --global-batch-size or "
            "--micro-batch-size",
        ),
        (
            "--train-samples 20",
            1,
            "training.train_iters (10) and training.train_samples (20) must not both be given: drop one of --train-iters "
            "and --train-samples",
        ),
        # schedules
        ("--min-lr 1", 1, "optimizer.min_lr (1.0) must be at most optimizer.lr (0.001): change --min-lr or --lr"),
        (
            "--lr-warmup-iters 10",
            1,
            "optimizer.lr_warmup_iters (10) must be less than optimizer.lr_decay_iters (10): change --lr-warmup-iters or "
            "--lr-decay-iters",
        ),
        (
            "--lr-warmup-iters 1 --lr-warmup-fraction 0.1",
            1,
            "optimizer.lr_warmup_fraction (0.1) and optimizer.lr_warmup_iters (1) must not both be given: drop one of them",
        ),
        (
            "--lr-warmup-samples 5",
            1,
            "optimizer.lr_warmup_samples (5) must not be given for a run that is counted in iters: give --lr-warmup-iters "
            "instead",
        ),
        ("--lr-decay-style WSD", 1, "optimizer.lr_wsd_decay_iters (absent) must be given: set --lr-wsd-decay-iters"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 11",
            1,
            "optimizer.lr_wsd_decay_iters (11) must be at most optimizer.lr_decay_iters (10): change --lr-wsd-decay-iters "
            "or --lr-decay-iters",
        ),
        (
            "--start-weight-decay 0 --end-weight-decay 0.01",
            1,
            "optimizer.start_weight_decay (0.0) must be optimizer.weight_decay (0.01) with "
            "optimizer.weight_decay_incr_style (constant) weight decay: set --weight-decay-incr-style linear or cosine, or "
            "drop it",
        ),
        (
            "--weight-decay-incr-style linear --end-weight-decay 0.1",
            1,
            "optimizer.start_weight_decay (absent) must be given: set --start-weight-decay",
        ),
        (
            "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
            1,
            "optimizer.override_opt_param_scheduler (True) and optimizer.use_checkpoint_opt_param_scheduler (True) must not "
            "both be on: drop one of them",
        ),
        # recomputation
        (
            "--recompute-granularity full --recompute-activations",
            1,
            "recompute.recompute_activations (True) must be off with recompute.recompute_granularity (full) recomputation: "
            "drop one of them",
        ),
        (
            "--recompute-granularity full --moe-layer-recompute",
            1,
            "moe.moe_layer_recompute (True) must be off with recompute.recompute_granularity (full) recomputation: drop one "
            "of them",
        ),
        (
            "--recompute-activations --recompute-method block",
            1,
            "recompute.recompute_method (block) must not be given without full recomputation: set --recompute-granularity "
            "full or drop it",
        ),
        (
            "--recompute-granularity full --recompute-num-layers 5",
            1,
            "recompute.recompute_num_layers (5) must be at most model.num_layers (4): change --recompute-num-layers or "
            "--num-layers",
        ),
        # data
        (
            "--split 1,2,3,4",
            1,
            "data.split (1,2,3,4) must be up to three shares that are not all 0, such as 969,30,1: change --split",
        ),
        (
            "--split 0,0,0",
            1,
            "data.split (0,0,0) must be up to three shares that are not all 0, such as 969,30,1: change --split",
        ),
        (
            "--split a",
            1,
            "data.split (a) must be up to three shares that are not all 0, such as 969,30,1: change --split",
        ),
        ("--data-path x", 1, "data.data_path (['x']) must not be given with data.mock_data (True): drop one of them"),
        (
            "--tokenizer-type Llama2Tokenizer",
            1,
            "data.tokenizer_model (absent) must be given: set --tokenizer-model",
        ),
        (
            "--tokenizer-type TikTokenizer",
            1,
            "data.tokenizer_type (TikTokenizer) must be one of SentencePieceTokenizer, GPTSentencePieceTokenizer, "
            "Llama2Tokenizer, HuggingFaceTokenizer, ByteTokenizer, NullTokenizer: change --tokenizer-type",
        ),
        # checkpoints
        (
            "--save-interval 4 --save-retain-interval 6 --save S",
            1,
            "checkpoint.save_retain_interval (6) must be divisible by checkpoint.save_interval (4): change "
            "--save-retain-interval or --save-interval",
        ),
        ("--ckpt-step 3", 1, "checkpoint.ckpt_step (3) must not be given without a folder: set --load"),
        (
            "--exit-on-missing-checkpoint",
            1,
            "checkpoint.exit_on_missing_checkpoint (True) must be off without a folder: set --load",
        ),
        (
            "--finetune",
            1,
            "checkpoint.finetune (True) must be off without weights: set --load or --pretrained-checkpoint",
        ),
        # logging
        (
            "--profile --profile-step-start 12",
            1,
            "logging.profile_step_start (12) must be less than logging.profile_step_end (12): change --profile-step-start "
            "or --profile-step-end",
        ),
        (
            "--profile --profile-ranks 0 2",
            2,
            "logging.profile_ranks ([0, 2]) must be below world size (2): change --profile-ranks",
        ),
    ],
)
def test_each_rule(flags: str, world_size: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines_for(flags, world_size) == [line]
    assert list(tmp_path.iterdir()) == []  # nothing is created for a run that cannot start


def _without(flag: str, base: list[str] = SMALL) -> list[str]:
    at = base.index(flag)
    return base[:at] + base[at + 2 :]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--num-layers", "model.num_layers (absent) must be given: set --num-layers"),
        ("--hidden-size", "model.hidden_size (absent) must be given: set --hidden-size"),
        ("--num-attention-heads", "model.num_attention_heads (absent) must be given: set --num-attention-heads"),
        ("--seq-length", "model.seq_length (absent) must be given: set --seq-length"),
        ("--micro-batch-size", "training.micro_batch_size (absent) must be given: set --micro-batch-size"),
        ("--lr", "optimizer.lr (absent) must be given: set --lr"),
        ("--train-iters", "training.train_iters (absent) must be given: set --train-iters or --train-samples"),
    ],
)
def test_required_settings(flag: str, line: str) -> None:
    assert lines_for("", base=_without(flag)) == [line]


def test_experts_are_needed_for_expert_parallelism() -> None:
    assert lines_for("--expert-model-parallel-size 2", 2, DENSE) == [
        "parallel.expert_model_parallel_size (2) must be 1 without experts: set --num-experts or drop "
        "--expert-model-parallel-size"
    ]


def test_data_and_tokenizer_are_needed() -> None:
    base = [word for word in SMALL if word != "--mock-data"]
    assert lines_for("", base=base) == [
        "data.data_path (absent) must be given: set --data-path, or --mock-data to try things out",
        "data.tokenizer_type (absent) must be given: set --tokenizer-type",
    ]
    assert lines_for("--data-path x --tokenizer-type NullTokenizer", base=base) == [
        "model.vocab_size (absent) must be given: set --vocab-size"
    ]
    assert lines_for("--data-path x --valid-data-path y --split 1,1,1 --tokenizer-type ByteTokenizer", base=base) == [
        "data.valid_data_path (['y']) must not be given with data.data_path (['x']): drop one of them",
        "data.split (1,1,1) must not be given with data.valid_data_path (['y']), which splits by itself: drop --split",
    ]
    assert (
        validate(parse_args([*base, *["--train-data-path", "x", "--tokenizer-type", "ByteTokenizer"]]), 1).data.split
        is None
    )


def test_as_many_problems_as_possible_at_once() -> None:
    flags = (
        "--num-layers 0 --hidden-size 66 --num-experts 63 --expert-model-parallel-size 8 --optimizer muon --min-lr 2"
    )
    assert [line.split(" ")[0] for line in lines_for(flags, 4)] == [
        "model.num_layers",
        "optimizer.optimizer",
        "model.hidden_size",
        "moe.num_experts",
        "world",
        "optimizer.min_lr",
    ]


def test_a_dry_run_needs_neither_data_nor_schedule_nor_folders(tmp_path: Path) -> None:
    sizes = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 4 --micro-batch-size 1"
    words = [*sizes.split(), "--dry-run"]
    folder = tmp_path / "run"
    validate(parse_args([*words, "--save", str(folder)]), 64)
    assert not folder.exists()


def test_output_folders_are_created_and_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cfg = small(f"--save {tmp_path}/a/b --tensorboard-dir {tmp_path}/c --metrics-jsonl {tmp_path}/d/m.jsonl")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir() and (tmp_path / "d").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == [] and cfg.checkpoint.save
    bad = f"{tmp_path}/file/run"
    assert lines_for(f"--save {bad} --metrics-jsonl {bad}/m.jsonl") == [
        f"checkpoint.save ({bad}) must be writable (Not a directory): choose another place or free it",
        f"logging.metrics_jsonl ({bad}/m.jsonl) must be writable (Not a directory): choose another place or free it",
    ]


def test_read_only_folder() -> None:
    (line,) = lines_for("--save /proc/run")  # not even root can write there
    assert line.startswith("checkpoint.save (/proc/run) must be writable (")
