from __future__ import annotations

import pytest

from megatron_lsh.config import T5Config, parse_args, validate
from megatron_lsh.plan.dry_run import dry_run

MIXTRAL = (
    "--disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32 --hidden-size 4096 "
    "--ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0 "
    "--hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion "
    "--no-position-embedding --num-experts 8 --expert-model-parallel-size 8 --moe-router-load-balancing-type aux_loss "
    "--moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-permute-fusion "
    "--moe-token-dispatcher-type alltoall --tokenizer-type Llama2Tokenizer --tokenizer-model T --data-path D "
    "--split 99990,8,2 --micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000 "
    "--lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 "
    "--clip-grad 1.0 --bf16 --overlap-grad-reduce --overlap-param-gather --tensor-model-parallel-size 1 "
    "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 8 --sequence-parallel "
    "--use-distributed-optimizer --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save S "
    "--load L --tensorboard-dir TB --ckpt-format torch_dist --auto-detect-ckpt-format --dry-run"
)


def report(flags: str, world_size: int = 32) -> list[str]:
    return dry_run(validate(parse_args([*flags.split(), "--world-size", str(world_size)]), world_size)).splitlines()


def test_mixtral_on_32_ranks() -> None:
    """The parameter counts are those of the released model."""
    lines = report(MIXTRAL + " --pipeline-model-parallel-size 1")
    assert "  expert parallel:      4 groups of 8: [0 1 2 3 4 5 6 7] [8 9 10 11 12 13 14 15] " in lines[3] + " "
    assert lines[:3] == [
        "Layout of 32 ranks (rank = dp * 1 + tp = edp * 8 + ep)",
        "  tensor parallel:      32 groups of 1: [0] [1] [2] ... [31]",
        "  data parallel:        1 groups of 32: [0 1 .. 31]",
    ]
    assert lines[4].startswith("  expert data parallel: 8 groups of 4: [0 8 16 24] [1 9 17 25]")
    assert "  total         46,702,792,704" in lines
    assert "  active        12,879,925,248   per token" in lines
    assert "  per rank       7,242,780,672   dense 1,605,636,096 + experts 5,637,144,576" in lines
    assert "  global batch 256 = micro batch 1 x data parallel 32 x 8 micro-batches; 1,048,576 tokens" in lines
    assert "  weights (fp32)                    5.44 GiB" in lines  # 1.459e9 x 4 bytes
    assert "  optimizer (adam, fp32)           10.87 GiB" in lines
    assert any("no effect here: --no-masked-softmax-fusion" in line for line in lines)
    assert lines[-1] == "Nothing was started and no data was read."


@pytest.mark.parametrize(("world", "micro_batches", "bubble"), [(32, 32, "8.6%"), (64, 16, "15.8%")])
def test_mixtral_as_it_stands_has_four_stages_of_eight_layers(world: int, micro_batches: int, bubble: str) -> None:
    lines = report(MIXTRAL, world)
    at = next(number for number, line in enumerate(lines) if line.startswith("Pipeline of 4 stages, 1F1B: "))
    assert f"ranks wait {bubble} of a step of {micro_batches} micro-batches" in lines[at]  # 3 / (m + 3)
    first, *middle, last = lines[at + 1 : at + 5]
    assert first.startswith(
        "  stage 0: layers 0-7; 1,876,230,144 parameters per rank; activations of 4 micro-batches at"
    )
    assert [line.split("; ")[0] for line in middle] == ["  stage 1: layers 8-15", "  stage 2: layers 16-23"]
    assert last.startswith("  stage 3: layers 24-31; 1,876,234,240")  # with the output layer and the final norm
    held = sum(int(line.split("; ")[1].split()[0].replace(",", "")) for line in (first, *middle, last))
    experts = 7 * (32 * 3 * 4096 * 14336)  # each of 8 expert-parallel ranks has one of the 8 of each layer
    assert f"  total     {held + experts:>18,}" in lines
    worst = max(line.split("; ")[-1] for line in (first, *middle, last))
    assert ["sum", *worst.split()] in [line.split() for line in lines]
    # 3 borders of stages, forward and backward; the experts of a stage are on one node.
    assert any(line.endswith(": 0.0 to experts and back; 6.0 between pipeline stages") for line in lines)


def test_virtual_stages_make_the_bubble_smaller_and_send_more_rows() -> None:
    lines = report(MIXTRAL.replace("pipeline-stage 8", "pipeline-stage 2") + " --moe-node-size 4")
    assert any("interleaved 1F1B, 4 virtual stages per rank: ranks wait 2.3% of" in line for line in lines)
    # 0.75 / (32 + 0.75)
    assert any(line.startswith("  stage 1: layers 2-3, 10-11, 18-19, 26-27; ") for line in lines)
    # 32 layers, 2 experts, there and back, forward and backward, half of them on the other node; 15 steps between stages.
    assert any(": 128.0 to experts and back; 30.0 between pipeline stages" in line for line in lines)


def test_a_pipeline_across_two_nodes_sends_two_rows_per_token() -> None:
    flags = (
        "--num-layers 24 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --vocab-size 100 "
        "--mock-data --dry-run --num-experts 4 --moe-token-dispatcher-type lsh --lsh-target-rate 0.2 --moe-node-size 2 "
    )
    across = report(flags + "--expert-model-parallel-size 4", 4)
    assert any(
        "96.0 to experts and back if all travel, 19.2 under LSH at --lsh-target-rate 0.2" in row for row in across
    )
    inside = report(flags + "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2", 4)
    assert any(": 0.0 to experts and back" in row and "; 2.0 between pipeline stages" in row for row in inside)


def test_memory_shrinks_as_expected() -> None:
    def memory(flags: str) -> dict[str, float]:
        lines = report(MIXTRAL + " --pipeline-model-parallel-size 1 " + flags)
        rows = [line.rsplit(maxsplit=2) for line in lines if line.endswith("GiB")]
        return {name.strip(): float(size) for name, size, _ in rows}

    plain, recomputed = memory(""), memory("--recompute-granularity full")
    assert recomputed["activations (estimate)"] < plain["activations (estimate)"] / 10
    assert sum(list(plain.values())[:-1]) == pytest.approx(plain["sum"], abs=0.05)
    assert memory("--tensor-model-parallel-size 4")["gathered weights (bf16)"] < plain["gathered weights (bf16)"]
    assert memory("--optimizer sgd")["optimizer (sgd, fp32)"] == pytest.approx(
        plain["optimizer (adam, fp32)"] / 2, abs=0.01
    )


def test_folded_layout_and_dense_model() -> None:
    small = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --vocab-size 100 "
        "--mock-data --dry-run --make-vocab-size-divisible-by 32"
    )
    lines = report(small + " --num-experts 4 --expert-model-parallel-size 4 --tensor-model-parallel-size 2", 4)
    assert lines[1:5] == [
        "  tensor parallel:      2 groups of 2: [0 1] [2 3]",
        "  data parallel:        2 groups of 2: [0 2] [1 3]",
        "  expert parallel:      1 groups of 4: [0 1 2 3]",
        "  expert data parallel: 4 groups of 1: [0] [1] [2] [3]",
    ]
    assert "Parameters (vocabulary 101, tokenizer; padded to 128)" in lines
    dense = report(small, 2)
    assert not any("expert" in line for line in dense if not line.startswith("  per rank"))
    assert (
        next(line for line in dense if "total" in line).split()[1]
        == next(line for line in dense if "active" in line).split()[1]
    )


def test_t5_counts_both_stacks() -> None:
    flags = (
        "--encoder-num-layers 2 --decoder-num-layers 3 --encoder-seq-length 16 --decoder-seq-length 8 --hidden-size 32 "
        "--num-attention-heads 4 --micro-batch-size 2 --vocab-size 100 --mock-data --dry-run --num-experts 4 "
        "--moe-layer-freq 2 --make-vocab-size-divisible-by 32 --position-embedding-type relative"
    )
    lines = dry_run(validate(parse_args(flags.split(), T5Config), 1)).splitlines()
    assert any("experts: 4 in each of 3 of 2 encoder and 3 decoder layers" in line for line in lines)
    assert any(line.endswith("; 48 tokens") for line in lines)
    layer = 4 * (32 * 32 + 32) + 2 * 64  # attention, two norms
    cross = 4 * (32 * 32 + 32) + 64
    ffn = 2 * 32 * 128 + 128 + 32
    expert_layers = 3 * (4 * ffn + 4 * 32 + 4)  # the router has a bias where linear layers have one
    total = 5 * layer + 3 * cross + 2 * ffn + expert_layers + 2 * 64 + 2 * 32 * 4 + 128 * 32
    assert f"  total     {total:>18,}" in lines


def test_world_size_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    cfg = parse_args([*MIXTRAL.split(), "--pipeline-model-parallel-size", "1"])
    assert dry_run(validate(cfg, 16)).startswith("Layout of 16 ranks")
