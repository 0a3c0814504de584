"""How layers are shared out over pipeline stages, and what is refused of them."""

from __future__ import annotations

import pytest

from megatron_lsh.config import BertConfig, ClassificationConfig, T5Config, parse_args, validate
from megatron_lsh.config.pipeline import Stages
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.errors import ConfigError
from tests.config.command_lines import lines_for

PP2 = "--num-layers 8 --pipeline-model-parallel-size 2 --global-batch-size 24"


@pytest.mark.parametrize(
    ("stages", "layers", "expected"),
    [
        (Stages(), 3, [["0-2"]]),
        (Stages(4), 8, [["0-1"], ["2-3"], ["4-5"], ["6-7"]]),
        (Stages(2, 2), 8, [["0-1", "4-5"], ["2-3", "6-7"]]),
        (Stages(4, 1, 1, 3), 10, [["0-0"], ["1-3"], ["4-6"], ["7-9"]]),
        (Stages(2, 1, 5, None), 8, [["0-4"], ["5-7"]]),
        (Stages(3, 1, None, 1), 9, [["0-3"], ["4-7"], ["8-8"]]),
        # As in Megatron-LM, the first rank's layers are cut into its virtual stages.
        (Stages(3, 2, 2, 2), 8, [["0-0", "4-4"], ["1-2", "5-6"], ["3-3", "7-7"]]),
    ],
)
def test_stages_hold_consecutive_layers(stages: Stages, layers: int, expected: list[list[str]]) -> None:
    held = [stages.of_rank(rank, layers) for rank in range(stages.ranks)]
    assert [[f"{c.layers.start}-{c.layers.stop - 1}" for c in chunks] for chunks in held] == expected
    every = [chunk for chunks in held for chunk in chunks]
    assert sorted(layer for chunk in every for layer in chunk.layers) == list(range(layers))
    assert [chunk for chunk in every if chunk.first] == [held[0][0]]
    assert [chunk for chunk in every if chunk.last] == [held[-1][-1]]


@pytest.mark.parametrize(
    ("flags", "world", "words"),
    [
        ("--num-layers 7 --pipeline-model-parallel-size 2", 2, ["model.num_layers (7) must be divisible by", "(2)"]),
        (f"{PP2} --decoder-first-pipeline-num-layers 8", 2, ["decoder_first_pipeline_num_layers (8)", "none without"]),
        ("--num-layers 1 --pipeline-model-parallel-size 2", 2, ["model.num_layers (1)"]),
        (PP2, 3, ["world size (3) must be divisible by", "pipeline_model_parallel_size (2)"]),
        (
            f"{PP2} --expert-model-parallel-size 8",
            8,
            ["ranks of a stage (4 = world size 8 / ", "must be divisible by parallel.expert_model_parallel_size (8)"],
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 3",
            2,
            ["layers of a stage (4)", "(3)", "change --num-virtual"],
        ),
        (f"{PP2} --num-layers-per-virtual-pipeline-stage 3", 2, ["layers of a stage (4) must be divisible by", "(3)"]),
        (
            f"{PP2} --num-layers-per-virtual-pipeline-stage 2 --num-virtual-stages-per-pipeline-rank 2",
            2,
            ["must not both be given"],
        ),
        (
            f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --decoder-first-pipeline-num-layers 3",
            2,
            ["must not be given with", "--num-virtual-stages-per-pipeline-rank"],
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 2 --global-batch-size 6",
            2,
            ["micro-batches of a global batch", "(6) / 2)", "must be divisible by"],
        ),
        (
            f"{PP2} --recompute-granularity full --recompute-num-layers 5",
            2,
            ["recompute_num_layers (5) must be at most 4"],
        ),
        (f"{PP2} --sample-prompt x", 2, ["sample_prompt (x) must not be given with", "tools/generate.py"]),
    ],
)
def test_what_does_not_fit_is_refused_with_value_rule_and_fix(flags: str, world: int, words: list[str]) -> None:
    (line,) = lines_for(flags, world)
    assert all(word in line for word in words), line
    assert ": " in line and any(verb in line for verb in ("change --", "drop ", "give --")), line


def test_one_virtual_stage_is_the_plain_schedule() -> None:
    cfg = validate(parse_args(f"{SMALL_FLAGS} {PP2} --num-layers-per-virtual-pipeline-stage 4".split()), 2)
    assert Stages.from_config(cfg.parallel) == Stages(2, 1)
    cfg = validate(parse_args(f"{SMALL_FLAGS} {PP2} --num-layers-per-virtual-pipeline-stage 1".split()), 2)
    assert Stages.from_config(cfg.parallel) == Stages(2, 4)
    again = validate(cfg, 2)  # what was derived is derived again, and not taken for a second flag
    assert again.parallel.num_virtual_stages_per_pipeline_rank == 4


def test_without_stages_their_flags_have_no_effect_and_say_so() -> None:
    cfg = validate(parse_args(f"{SMALL_FLAGS} --decoder-last-pipeline-num-layers 1".split()), 1)
    assert "no effect with one pipeline stage: --decoder-last-pipeline-num-layers" in cfg.notices


@pytest.mark.parametrize("config", [T5Config, ClassificationConfig, SwinConfig])
def test_models_that_stages_cannot_run_say_why(config: type) -> None:
    cfg = config()
    cfg.parallel.pipeline_model_parallel_size = 2
    with pytest.raises(ConfigError) as error:
        validate(cfg, 2)
    (line,) = [line for line in str(error.value).splitlines() if "pipeline" in line]
    assert line.startswith(
        "parallel.pipeline_model_parallel_size (2) must be 1: pipeline parallelism is not implemented for"
    )
    assert "set --pipeline-model-parallel-size 1" in line
    assert BertConfig.why_no_pipeline is None


def test_a_layout_by_a_pattern_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"--pipeline-model-parallel-layout.*not implemented.*--decoder-first-pipeline"
    ):
        parse_args(["--pipeline-model-parallel-layout", "Et*3|(tt|)*29,m|L"])


SMALL_FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    "--train-iters 10 --lr 1e-3 --mock-data"
)
