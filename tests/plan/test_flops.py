from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_lsh.config import validate
from megatron_lsh.families import BERT, GPT, SWIN, T5
from megatron_lsh.plan.flops import forward_flops, layer_work, measure_matmul, peak_flops, training_flops
from tests.models.swin_helpers import make_pictures, make_swin, swin_config
from tests.training.helpers import tiny_config


def test_dense_by_hand() -> None:
    """D 32, 4 heads of 8, S 32, SwiGLU F 48, V 64; counted on paper."""
    cfg = tiny_config()
    cfg.moe.num_experts = None
    attention = 32 * 96 + 32 * 32 + 2 * 32 * 16  # QKV, output, causal scores
    feed_forward = 3 * 32 * 48
    assert forward_flops(GPT, cfg, 64) == 32 * 2 * (2 * (attention + feed_forward) + 32 * 64)


def test_experts_count_once_per_choice() -> None:
    cfg = tiny_config("--moe-layer-freq ([0]+[1]) --moe-shared-expert-intermediate-size 16")
    attention = 32 * 96 + 32 * 32 + 2 * 32 * 16
    dense = 3 * 32 * 48
    moe = 2 * 3 * 32 * 32 + 3 * 32 * 16 + 32 * 4  # top-2 experts of width 32, shared expert, router
    assert forward_flops(GPT, cfg, 64) == 32 * 2 * (2 * attention + dense + moe + 32 * 64)


def test_mixtral_is_about_six_times_the_active_parameters() -> None:
    cfg = tiny_config(
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --moe-ffn-hidden-size 14336 --num-attention-heads 32 "
        "--group-query-attention --num-query-groups 8 --seq-length 4096 --num-experts 8"
    )
    per_token = training_flops(GPT, cfg, 32000) / 4096
    embedding = 4096 * 32000
    scores = 6 * 32 * 4096 * 4096  # 32 layers, D 4096, S 4096, causal
    assert per_token == pytest.approx(6 * (12_879_925_248 - embedding) + scores, rel=1e-3)


SMALL = (
    "--hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --micro-batch-size 2 --mock-data --lr 1 --train-iters 1 "
    "--num-experts 4 --moe-layer-freq 2 --moe-ffn-hidden-size 16 "
)


def test_bert_by_hand() -> None:
    """D 32, 4 heads of 8, S 16, GELU F 48, V 64; scores in full, and the dense layer of the masked-token head."""
    cfg = validate(BERT.parse((SMALL + "--num-layers 2 --seq-length 16").split()), 1)
    attention = 32 * 96 + 32 * 32 + 2 * 32 * 16
    moe = 2 * 2 * 32 * 16 + 32 * 4
    assert forward_flops(BERT, cfg, 64) == 16 * 2 * (2 * attention + 2 * 32 * 48 + moe + 32 * 32 + 32 * 64)
    assert BERT.tokens_per_sample(cfg) == 16


def test_t5_by_hand() -> None:
    """Two encoder layers on 16 tokens, three decoder layers on 8; the first and third of a stack have experts."""
    flags = "--encoder-num-layers 2 --decoder-num-layers 3 --encoder-seq-length 16 --decoder-seq-length 8"
    cfg = validate(T5.parse((SMALL + flags).split()), 1)
    projections, dense, moe = 32 * 96 + 32 * 32, 2 * 32 * 48, 2 * 2 * 32 * 16 + 32 * 4
    encoder = 16 * (2 * (projections + 2 * 32 * 16) + dense + moe)
    cross = 8 * (2 * 32 * 32 + 2 * 32 * 16) + 16 * 2 * 32 * 32  # queries, output, scores; keys and values
    decoder = 8 * (3 * (projections + 2 * 32 * 4) + dense + 2 * moe + 32 * 64) + 3 * cross
    assert T5.tokens_per_sample(cfg) == 24
    assert forward_flops(T5, cfg, 64) == pytest.approx(2 * (encoder + decoder))


def test_peaks() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, torch.float32, 2.5) == 2.5e12
    assert peak_flops(torch.device("meta"), torch.float32) is None
    state = torch.get_rng_state()
    assert 1e8 < measure_matmul(cpu, torch.float32, size=128, seconds=0.01) < 1e14
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.4, 51.2),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("Tesla V100-SXM2-32GB", 125.0, 15.7),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA RTX A4000", None, None),  # not an A40
    ],
)
def test_known_gpus(monkeypatch: pytest.MonkeyPatch, name: str, bf16: float | None, fp32: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert peak_flops(gpu, torch.bfloat16) == (bf16 and bf16 * 1e12)
    assert peak_flops(gpu, torch.float32) == (fp32 and fp32 * 1e12)


@pytest.mark.parametrize("side", [56, 64, 72])
def test_windows_that_are_filled_up_count_as_what_they_are(side: int) -> None:
    """Grids of 14, of 16 and of 18 patches, the latter two filled up to 21, in windows of 7: as torch counts them, which
    leaves out the scores on a CPU; the formula leaves out the networks of positions."""
    flags = f"--img-h {side} --swin-depths 2 2 --hidden-size 48 --swin-window-size 7 --num-classes 4"
    cfg = swin_config(flags)
    model = make_swin(cfg).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(make_pictures(cfg, 1)[0])
    layers = ((stack, layer_work(stack, is_moe=False).scores) for stack in SWIN.stacks(cfg))
    scores = sum(2 * stack.num_layers * stack.seq_length * of_layer for stack, of_layer in layers)
    assert forward_flops(SWIN, cfg, 0) - scores == pytest.approx(counter.get_total_flops(), rel=0.02)
