"""Runs on pipeline stages: what they log, save, skip and decide is what one rank does."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_lsh.checkpoint.folders import TRACKER
from megatron_lsh.commands import generate
from megatron_lsh.config import BertConfig, Config, parse_args, validate
from megatron_lsh.families import BERT, GPT, Losses
from megatron_lsh.observing.writers import read_jsonl
from megatron_lsh.parallel.data_parallel import counted_parameters, global_norm
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.parallel.parameters import is_copy
from megatron_lsh.parallel.testing import DistributedTestError, run_distributed_test
from megatron_lsh.training.evaluate import evaluate
from megatron_lsh.training.run import Run, set_up
from megatron_lsh.training.train import train
from tests.training.helpers import TINY, copy_state, gpt_with, tiny_config

BASE = (
    "--num-layers 4 --moe-layer-freq [0,0,1,1] --train-iters 6 --global-batch-size 8 --eval-iters 1 --vocab-size 1023"
)
BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias"
PP2 = "--pipeline-model-parallel-size 2"
PP4 = "--pipeline-model-parallel-size 4"
EP2 = "--expert-model-parallel-size 2 --use-distributed-optimizer"
PP2_EP2 = f"{PP2} {EP2}"
LSH = "--moe-token-dispatcher-type lsh --lsh-target-rate 0.4"


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    """The one rank's."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def connect(flags: str, world_size: int) -> Run:
    cfg = tiny_config(f"{BASE} {flags}", world_size)
    return set_up(cfg, GPT, initialize(cfg.parallel))


def whole(tensor: Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().numpy()


def weights(run: Run) -> dict[str, np.ndarray]:
    """Of this rank's stage."""
    named = [*run.model.named_parameters(), *run.model.named_buffers()]
    return {name: whole(tensor) for name, tensor in named if "counts" not in name}


def together(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The weights of all stages. Those that several ranks have are equal to the bit."""
    result: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, value in rank.items():
            np.testing.assert_array_equal(result.setdefault(name, value), value, err_msg=name)
    return result


# What is logged, saved and resumed


def whole_run(folder: str, flags: str, world_size: int, length: int, killed_in: int = 0) -> tuple[str, int]:
    """What is printed, and the last iteration. In iteration `killed_in`, if any, all ranks are killed."""
    calls = 0

    def fatal(cfg: Config, model: nn.Module, batch: Any) -> Losses:
        nonlocal calls
        calls += model.training
        per_iteration = 4 // ParallelLayout.from_config(cfg.parallel, world_size).dp
        if killed_in and calls > (killed_in - 1) * per_iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return GPT.losses(cfg, model, batch)

    cfg = tiny_config(
        f"{BASE} {BIAS} {flags} --train-iters {length} --save {folder}/c --load {folder}/c --save-interval 2 "
        f"--save-retain-interval 2 --metrics-jsonl {folder}/m.jsonl --moe-per-layer-logging --log-params-norm "
        "--lr-decay-iters 6 --eval-interval 2",
        world_size,
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        state = train(cfg, gpt_with(fatal))
    return out.getvalue(), state.iteration


def continued(folder: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        flags = ["--prompt", "1 2 3", "--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]
        assert generate.main(["--load", folder, *flags]) == 0
    return out.getvalue()


def loaded_several(checkpoints: list[tuple[str, str]]) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    return [loaded(folder, flags, 4) for folder, flags in checkpoints]


def loaded(folder: str, flags: str, world_size: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights and moments of the last checkpoint under a layout, and its schedule."""
    run = connect(f"{BIAS} {flags} --load {folder}/c --ckpt-step 6", world_size)
    names = {param: name for name, param in run.model.named_parameters()}
    moments = {
        f"{names[param]}.{key}": whole(value)
        for param, state in run.step.optimizer.state.items()
        for key, value in state.items()
    }
    return weights(run) | moments, run.step.schedule.state_dict()


def figures(folder: Path) -> list[dict[str, Any]]:
    """Of every record, all that does not depend on the machine's speed or on how rows travel."""
    slow = ("time", "share", "tokens", "tflops", "mfu", "iteration_time", "bytes", "rows", "_ms", "gb", "peak")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in slow)}
        for record in read_jsonl(folder / "m.jsonl")
    ]


def assert_close(value: Any, expected: Any, name: str) -> None:
    if isinstance(expected, list):
        for one, other in zip(value, expected, strict=True):
            assert_close(one, other, name)
    elif expected is None:
        assert value is None, name
    else:
        assert value == pytest.approx(expected, rel=2e-4, abs=1e-6), name


@pytest.mark.slow
def test_a_run_on_stages_logs_and_saves_what_one_rank_does_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    one, four, cut = (str(tmp_path / name) for name in ("one", "four", "cut"))
    whole_run(one, "", 1, 6)
    (_, quiet, _, printed) = (text for text, _ in run_distributed_test(whole_run, 4, four, PP2_EP2, 4, 6))
    # The last rank reports of the layers of all stages; the first stage here has none with experts.
    assert "lm loss" in printed and "lm loss" not in quiet
    assert len(figures(Path(four))) == len(figures(Path(one))) == 10
    for stages, alone in zip(figures(Path(four)), figures(Path(one)), strict=True):
        assert stages.keys() == alone.keys()
        for key, value in alone.items():
            assert_close(stages[key], value, key)
        assert "lm_loss" not in alone or len(stages["load_balancing_loss_per_layer"]) == 2

    with pytest.raises(DistributedTestError, match="exit code -9"):
        run_distributed_test(whole_run, 4, cut, PP2_EP2, 4, 6, 5)
    assert (Path(cut) / "c" / TRACKER).read_text() == "4"
    assert run_distributed_test(whole_run, 4, cut, PP2_EP2, 4, 6)[0][1] == 6
    ranks = run_distributed_test(loaded_several, 4, [(four, PP2_EP2), (cut, PP2_EP2), (four, PP4), (one, PP2)])
    uninterrupted, resumed, on_four, of_one = (together([rank[n][0] for rank in ranks]) for n in range(4))
    assert ranks[0][0][1] == ranks[0][1][1], "the schedules differ"
    # What two stages saved, on one and on four; and what one rank saved, on two.
    for expected, state in (
        (uninterrupted, resumed),
        (uninterrupted, on_four),
        (uninterrupted, loaded(four, "", 1)[0]),
        (loaded(one, "", 1)[0], of_one),
    ):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)
    written = run_distributed_test(continued, 1, f"{four}/c")[0]
    assert len(written.split()) == 8, f"the checkpoint of stages continues a text on one rank: {written}"


# What is skipped, cast, compressed and decided


def several_things(world_size: int) -> dict[str, Any]:
    return {
        "skips": skips(world_size),
        "bf16": losses_of(f"{PP2_EP2} --bf16", world_size),
        "fp16": losses_of(f"{PP2} --fp16 --initial-loss-scale 1024", world_size),
        "tokens": losses_of(f"{PP2} --calculate-per-token-loss --eod-mask-loss", world_size),
        "bert": bert(f"{PP2_EP2} --num-virtual-stages-per-pipeline-rank 2", world_size),
        "lsh": forward_loss(f"{PP2_EP2} {LSH}", world_size),
        "tied": tied(world_size),
    }


def losses_of(flags: str, world_size: int) -> list[float]:
    run = connect(flags, world_size)
    batches = run.batches("train")
    results = [run.step(batches, iteration, False) for iteration in range(3)]
    assert not any(result.skipped for result in results)
    return [result.loss for result in results]


def bert(flags: str, world_size: int) -> list[tuple[float, ...]]:
    """Masked-token loss, sentence-order loss and gradient norm of a BERT, with padding."""
    words = f"{TINY} {BASE} {flags} --position-embedding-type learned_absolute --vocab-size 120"
    cfg = validate(parse_args(words.split(), BertConfig), world_size)
    run = set_up(cfg, BERT, initialize(cfg.parallel))
    batches = run.batches("train")
    results = [run.step(batches, iteration, False) for iteration in range(3)]
    return [(result.loss, result.further["sop loss"], result.grad_norm) for result in results]


def forward_loss(flags: str, world_size: int) -> float:
    """Of one evaluation, with the dispatcher that trains."""
    run = connect(flags, world_size)
    found = evaluate(run.step.pipeline, run.judge, [next(run.batches("train"))])
    assert found is not None
    return found["loss"]


def skips(world_size: int) -> list[bool]:
    """A NaN among the activations of the first stage, of the last, and none."""
    run = connect(f"{PP2_EP2} {BIAS}", world_size)
    batches, skipped = run.batches("train"), []

    def poison(module: nn.Module, arguments: Any, result: Any) -> Any:
        return result[0] * float("nan"), *result[1:]

    for stage in (0, 1, None):
        before = copy_state([*run.model.parameters(), *run.model.buffers()])
        layer = next(iter(run.model.decoder.layers.values()))  # type: ignore[operator,union-attr]
        hooks = [layer.register_forward_hook(poison)] if run.ctx.pp.rank == stage else []
        skipped.append(run.step(batches, len(skipped), False).skipped)
        for hook in hooks:
            hook.remove()
        after = copy_state([*run.model.parameters(), *run.model.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == skipped[-1]
    return skipped


def tied(world_size: int) -> tuple[float, list[str]]:
    """Norm of all parameters, and names of the copies that this rank does not count."""
    run = connect(PP2, world_size)
    norm = float(global_norm(counted_parameters(run.model), run.ctx))
    return norm, [name for name, param in run.model.named_parameters() if is_copy(param)]


@pytest.mark.slow
def test_stages_skip_cast_and_compress_as_one_rank_does() -> None:
    ranks = run_distributed_test(several_things, 4, 4)
    assert all(rank["skips"] == [True, True, False] for rank in ranks)
    for name, flags, tolerance in (
        ("bf16", "--bf16", 2e-3),
        ("fp16", "--fp16 --initial-loss-scale 1024", 2e-3),
        ("tokens", "--calculate-per-token-loss --eod-mask-loss", 1e-5),
    ):
        assert ranks[0][name] == pytest.approx(losses_of(flags, 1), rel=tolerance), name
        assert all(rank[name] == ranks[0][name] for rank in ranks)
    for stages, alone in zip(ranks[0]["bert"], bert("", 1), strict=True):
        assert stages == pytest.approx(alone, rel=1e-5)
    # The same tokens share a rank, so the same rows form clusters.
    (without,) = set(run_distributed_test(forward_loss, 2, f"{EP2} {LSH}", 2))
    assert {rank["lsh"] for rank in ranks} == {without}
    norm, copies = zip(*(rank["tied"] for rank in ranks), strict=True)
    assert copies == ([], [], ["embedding.word_embeddings.weight"], ["embedding.word_embeddings.weight"])
    run = connect("", 1)
    alone = np.sqrt(sum(np.square(whole(param)).sum() for param in run.model.parameters()))
    assert norm == pytest.approx([float(alone)] * 4, rel=1e-6)
