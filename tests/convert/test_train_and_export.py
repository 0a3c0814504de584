"""The whole way of every family: transformers -> native -> TP 2 x EP 2 -> five training steps -> transformers again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from megatron_lsh.checkpoint import CheckpointManager, TrainingState
from megatron_lsh.config import padded_vocab_size, to_dict
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.convert import load_hf, load_native, save_hf, save_native
from megatron_lsh.convert.native import find_native, read_config
from megatron_lsh.convert.source import VOCABULARY
from megatron_lsh.errors import CheckpointError
from megatron_lsh.families import GPT
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext, offline_context
from megatron_lsh.parallel.data_parallel import finalize_gradients, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from tests.convert.helpers import QUIET, hf_tensors
from tests.convert.tiny import MOE_FAMILIES, VOCAB, hf_logits, load_pretrained, prompts, save_tiny

STEPS = 5
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in (*MOE_FAMILIES, "llama")},
    "mixtral tied, no groups": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3_moe unnormalised, untied": {"norm_topk_prob": False, "tie_word_embeddings": False},
}


def load_train_save(root: str) -> dict[str, tuple[Tensor, Tensor]]:
    """On two ranks, for every model: (logits as loaded, logits after training), saved in ROOT/<name>/trained."""
    results = {}
    ctx: ParallelContext | None = None
    for name in VARIANTS:
        folder = Path(root, name)
        cfg = read_config(find_native(folder / "native", None))
        if ctx is None:
            cfg.parallel.tensor_model_parallel_size = cfg.parallel.expert_model_parallel_size = 2
            cfg.parallel.device = "cpu"
            ctx = initialize(cfg.parallel)
        vocab = padded_vocab_size(VOCAB, cfg.model.make_vocab_size_divisible_by, ctx.tp.size)
        telemetry = MoETelemetry(ctx.device)
        model = shard_model(GPT.build(cfg, vocab, ctx, telemetry), ctx, cfg.precision)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        rows = {key: VOCAB for key, _ in model.named_parameters() if key in VOCABULARY}
        state = TrainingState(
            model=model,
            optimizer=optimizer,
            config=to_dict(cfg)["config"],
            padded_rows=rows,
            progress={"iteration": STEPS},
        )
        checkpoint = CheckpointConfig(load=str(folder / "native"), save=str(folder / "trained"), save_rng=False)
        manager = CheckpointManager(checkpoint, ctx, notify=lambda text: None)
        loaded = manager.load(state)
        assert loaded is not None and loaded.weights_only and loaded.iteration == 0 and not loaded.notices[1:]
        before = logits_of(model)
        tokens_BS = prompts(length=17)
        for _ in range(STEPS):
            loss_BS, aux_loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
            (loss_BS.mean() + aux_loss).backward()
            finalize_gradients(model, ctx)
            optimizer.step()
            optimizer.zero_grad()
        manager.save(state)
        results[name] = (before, logits_of(model))
    return results


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    model.eval()
    logits: Tensor = model(prompts())[..., :VOCAB].clone()
    model.train()
    return logits


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    expected = {}
    for name, changes in VARIANTS.items():
        model = save_tiny(tmp_path / name / "hf", name.split()[0], initializer_range=0.15, **changes)
        expected[name] = hf_logits(model, prompts())
        save_native(load_hf(tmp_path / name / "hf"), tmp_path / name / "native", checks=QUIET)
    for results in run_distributed_test(load_train_save, 2, str(tmp_path)):
        for name, (before, after) in results.items():
            assert expected[name].std() > 0.2, name
            torch.testing.assert_close(
                before, expected[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
            assert (after - before).abs().max() > 1e-2, name
    for name, (_, after) in results.items():
        folder = tmp_path / name
        save_hf(load_native(folder / "trained"), folder / "exported", model_type=name.split()[0], checks=QUIET)
        assert {key: value.shape for key, value in hf_tensors(folder / "exported").items()} == {
            key: value.shape for key, value in hf_tensors(folder / "hf").items()
        }
        theirs = hf_logits(load_pretrained(folder / "exported"), prompts())
        torch.testing.assert_close(theirs, after, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_other_settings_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    """The same weights with another epsilon are another model; --finetune says that this is meant."""
    save_tiny(tmp_path / "hf", "llama")
    save_native(load_hf(tmp_path / "hf"), tmp_path / "native", checks=QUIET)
    cfg = read_config(find_native(tmp_path / "native", None))
    cfg.model.norm_epsilon = 1e-3
    ctx = offline_context(device="cpu")
    model = GPT.build(cfg, 128, ctx, MoETelemetry(ctx.device))
    state = TrainingState(model=model, config=to_dict(cfg)["config"], padded_rows=dict.fromkeys(VOCABULARY, VOCAB))
    for finetune in (True, False):
        manager = CheckpointManager(
            CheckpointConfig(load=str(tmp_path / "native"), finetune=finetune), ctx, notify=lambda text: None
        )
        if finetune:
            manager.load(state)
        else:
            with pytest.raises(CheckpointError, match=r"--norm-epsilon is 1e-06 in the checkpoint and 0.001 now"):
                manager.load(state)
