"""Settings of ranks that share every sequence: what goes together, and what is refused, and why."""

from __future__ import annotations

import pytest

from megatron_lsh.config import BertConfig, Config, T5Config, parse_args, validate
from megatron_lsh.config.classification import ClassificationConfig
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.errors import ConfigError
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.dry_run import dry_run

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    "--train-iters 10 --lr 1e-3 --mock-data --context-parallel-size"
)


def checked(flags: str, world: int) -> Config:
    return validate(parse_args(f"{FLAGS} {flags}".split()), world)


@pytest.mark.parametrize(
    ("flags", "world", "words"),
    [
        ("2 --seq-length 30", 2, ["seq_length (30) must be divisible by twice parallel.context_parallel_size (2)"]),
        (
            "2 --seq-length 36 --tensor-model-parallel-size 2 --sequence-parallel",
            4,
            ["seq_length (36)", "twice", "times parallel.tensor_model_parallel_size (2) with sequence parallelism"],
        ),
        (
            "2 --tensor-model-parallel-size 2",
            2,
            [
                "world size (2) must be divisible by",
                "context_parallel_size (2) times",
                "tensor_model_parallel_size (2)",
            ],
        ),
        ("3", 4, ["world size (4) must be divisible by parallel.context_parallel_size (3)"]),
        ("2 --global-batch-size 2", 8, ["data-parallel size (4 = world size 8 / ", "context_parallel_size (2)"]),
        ("2 --sample-prompt x", 2, ["sample_prompt (x) must not be given with", "tools/generate.py"]),
        (
            "2 --num-experts 4 --moe-router-load-balancing-type load_importance --moe-router-gate-noise 1",
            2,
            ["context_parallel_size (2) must be 1 with moe.moe_router_load_balancing_type (load_importance)"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_value_rule_and_fix(flags: str, world: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        checked(flags, world)
    lines = [line for line in str(error.value).splitlines() if all(word in line for word in words)]
    assert lines, error.value
    assert any(fix in lines[0] for fix in (": change --", ": drop it"))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BertConfig, "BERT, whose positions attend to later ones"),
        (T5Config, "T5, whose decoder attends to the encoder's"),
        (SwinConfig, "Swin, which attends within windows"),
        (ClassificationConfig, "classifiers, whose heads read one position"),
    ],
)
def test_models_whose_sequences_cannot_be_shared_say_why(config: type, why: str) -> None:
    cfg = config()
    cfg.parallel.context_parallel_size = 2
    with pytest.raises(ConfigError) as error:
        validate(cfg, 2)
    (line,) = [line for line in str(error.value).splitlines() if "context" in line]
    assert line.startswith(
        f"parallel.context_parallel_size (2) must be 1: context parallelism is not implemented for {why}"
    )
    assert "set --context-parallel-size 1" in line


@pytest.mark.parametrize("how", ["", "p2p", "all_gather", "a2a", "a2a+p2p", "p2p a2a"])
def test_one_notice_says_how_keys_and_values_travel(how: str) -> None:
    given = f"--cp-comm-type {how}" if how else ""
    notices = checked(f"2 {given}", 2).notices
    assert [notice for notice in notices if "all_gather" in notice] == [
        "context parallelism gathers keys and values: every --cp-comm-type runs as all_gather"
    ]
    assert not any("all_gather" in notice for notice in checked(f"1 {given}", 2).notices)


def test_the_layout_has_megatrons_order_and_batches_are_shared_by_its_ranks() -> None:
    cfg = checked("2 --tensor-model-parallel-size 2 --num-experts 4 --expert-model-parallel-size 4", 8)
    layout = ParallelLayout.from_config(cfg.parallel, 8)
    assert (layout.dp, layout.groups("tp")[0], layout.groups("cp")[:2]) == (2, [0, 1], [[0, 2], [1, 3]])
    assert layout.groups("dp")[0] == [0, 4]
    assert layout.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]], "experts see ranks of one sequence as others"


def test_a_dry_run_lays_it_out() -> None:
    big = (
        "--num-layers 8 --hidden-size 2048 --num-attention-heads 16 --seq-length 8192 --vocab-size 1000 --dry-run "
        "--use-distributed-optimizer --global-batch-size 8 --world-size 4 --hidden-dropout 0"
    )

    def lines(size: int) -> list[str]:
        return dry_run(checked(f"{size} {big}", 4)).splitlines()

    def activations(size: int) -> float:
        (line,) = [line for line in lines(size) if line.startswith("  activations")]
        return float(line.split()[-2])

    shared = lines(4)
    assert shared[0] == "Layout of 4 ranks (rank = dp * 4 + cp * 1 + tp = edp * 1 + ep)"
    assert "  context parallel:     1 groups of 4: [0 1 2 3]" in shared
    assert any("data parallel 1 x 4 micro-batches; 65,536 tokens" in line for line in shared)
    # 8 layers, key and value to two ranks of the other node, and their gradients.
    crossing = dry_run(checked(f"4 {big} --moe-node-size 2", 4)).splitlines()
    assert any(line.endswith("64.0 of keys and values, 2048 wide, to ranks of the sequence") for line in crossing)
    # Of what a rank keeps only the keys and values are those of whole sequences.
    assert activations(1) / 4 < activations(4) < activations(1) / 2.5
    sharded = [[line for line in lines(size) if line.startswith("  sharded")] for size in (1, 4)]
    assert sharded[0] == sharded[1], "the optimizer is sharded over ranks of one sequence as well"
