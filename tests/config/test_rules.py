"""validate: every rule, with the line a user sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lsh.config import parse_args, validate
from tests.config.command_lines import DENSE, SMALL, lines_for, small, without


@pytest.mark.parametrize(
    ("flags", "world_size", "line"),
    [
        # single values
        ("--num-layers 0", 1, "model.num_layers (0) must be at least 1 and at most 100000: change --num-layers"),
        ("--lsh-num-hashes 0", 1, "lsh.lsh_num_hashes (0) must be at least 1: change --lsh-num-hashes"),
        ("--lsh-hash-width 0", 1, "lsh.lsh_hash_width (0) must be at least 1: change --lsh-hash-width"),
        (
            "--lsh-residual some",
            1,
            "lsh.lsh_residual (some) must be one of none, identity, lowrank, interpolate: change --lsh-residual",
        ),
        (
            "--lsh-representative seed",
            1,
            "lsh.lsh_representative (seed) must be one of mean, member: change --lsh-representative",
        ),
        (
            "--lsh-gradient straight-through",
            1,
            "lsh.lsh_gradient (straight-through) must be exact with lsh.lsh_residual (interpolate): set "
            "--lsh-residual none: every other residual has a gradient of its own",
        ),
        (
            "--lsh-start-layer 4",
            1,
            "lsh.lsh_start_layer (4) must be below model.num_layers (4): use --moe-token-dispatcher-type alltoall to run "
            "every layer exactly",
        ),
        ("--lsh-target-rate 0", 1, "lsh.lsh_target_rate (0) must be above 0 and at most 1: change --lsh-target-rate"),
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
            "--moe-router-topk 4 --moe-router-group-topk 2",
            1,
            "moe.moe_router_num_groups (absent) must be given: set --moe-router-num-groups",
        ),
        (
            "--moe-router-topk 4 --moe-router-group-topk 2 --moe-router-num-groups 3",
            1,
            "moe.num_experts (8) must be divisible by moe.moe_router_num_groups (3): change --num-experts or "
            "--moe-router-num-groups",
        ),
        (
            "--moe-router-topk 4 --moe-router-group-topk 3 --moe-router-num-groups 2",
            1,
            "moe.moe_router_group_topk (3) must be at most moe.moe_router_num_groups (2): change --moe-router-group-topk "
            "or --moe-router-num-groups",
        ),
        (
            "--moe-router-group-topk 3 --moe-router-num-groups 4",
            1,
            "moe.moe_router_topk (2) must be at least moe.moe_router_group_topk (3), because a group's score is the sum of "
            "its best topk / group-topk: change --moe-router-topk or --moe-router-group-topk",
        ),
        (
            "--moe-router-topk 5 --moe-router-group-topk 2 --moe-router-num-groups 4",
            1,
            "moe.moe_router_topk (5) must be at most the moe.moe_router_group_topk (2) groups' share of moe.num_experts (8) "
            "in moe.moe_router_num_groups (4) groups: change --moe-router-topk or --moe-router-group-topk or --num-experts "
            "or --moe-router-num-groups",
        ),
        (
            "--moe-router-load-balancing-type sinkhorn",
            1,
            "moe.moe_aux_loss_coeff (0.01) must be 0 with moe.moe_router_load_balancing_type (sinkhorn), which balances "
            "without a loss: drop --moe-aux-loss-coeff",
        ),
        (
            "--moe-aux-loss-coeff 0 --moe-router-load-balancing-type sinkhorn --moe-router-topk-scaling-factor 2",
            1,
            "moe.moe_router_topk_scaling_factor (2.0) must not be given with moe.moe_router_load_balancing_type (sinkhorn): "
            "drop --moe-router-topk-scaling-factor",
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
            "data.tokenizer_type (TikTokenizer) must be one of GPT2BPETokenizer, BertWordPieceLowerCase, BertWordPieceCase, "
            "SentencePieceTokenizer, GPTSentencePieceTokenizer, Llama2Tokenizer, HuggingFaceTokenizer, ByteTokenizer, "
            "NullTokenizer: change --tokenizer-type",
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
    assert lines_for("", base=without(flag)) == [line]


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
        "--num-layers 0 --hidden-size 66 --num-experts 63 --expert-model-parallel-size 8 --optimizer lion --min-lr 2"
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


def test_output_folders_are_created_and_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # messages cut long paths short
    (tmp_path / "file").write_text("")
    cfg = small(f"--save {tmp_path}/a/b --tensorboard-dir {tmp_path}/c --metrics-jsonl {tmp_path}/d/m.jsonl")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir() and (tmp_path / "d").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == [] and cfg.checkpoint.save
    bad = "file/run"
    assert lines_for(f"--save {bad} --metrics-jsonl {bad}/m.jsonl") == [
        f"checkpoint.save ({bad}) must be writable (Not a directory): choose another place or free it",
        f"logging.metrics_jsonl ({bad}/m.jsonl) must be writable (Not a directory): choose another place or free it",
    ]


def test_read_only_folder() -> None:
    (line,) = lines_for("--save /proc/run")  # not even root can write there
    assert line.startswith("checkpoint.save (/proc/run) must be writable (")
