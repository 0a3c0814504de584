from __future__ import annotations

import pytest

from megatron_lsh.config import T5Config, parse_args, validate
from megatron_lsh.errors import ConfigError
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


def test_mixtral_with_pipeline_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline_model_parallel_size \(4\) must be 1"):
        report(MIXTRAL)


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
