"""Megatron-LM's legacy format, against a file that Megatron-Core itself wrote, and cut and joined in every layout.

megatron_core_0_16_1/ holds what megatron-core 0.16.1 made on one CPU rank: a GPTModel of the local spec (a dense layer and a
layer of four experts with a shared one), saved with args (an enum among them) and random states, and its logits.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lsh.convert import load_hf, load_megatron, load_model, load_native, save_megatron, save_native
from megatron_lsh.convert.megatron import FILE
from megatron_lsh.convert.source import Source
from megatron_lsh.convert.torch_file import Inert, open_torch_file
from megatron_lsh.errors import CheckpointError
from tests.convert.helpers import QUIET, assert_bit_equal, contents, native_tensors

REAL = Path(__file__).parent / "megatron_core_0_16_1"
VOCAB = 100


def read(file: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def real() -> Source:
    return load_megatron(REAL, vocab_size=VOCAB)


@torch.no_grad()
def test_what_megatron_wrote_computes_the_same_here(real: Source) -> None:
    cfg = real.cfg
    assert cfg.moe.num_experts == 4 and cfg.moe.moe_layer_freq == "[0, 1]" and cfg.model.add_qkv_bias
    expected = read(REAL / "logits.pt")
    logits = load_model(real)(expected["tokens"])
    assert expected["logits"].std() > 0.1
    torch.testing.assert_close(logits[..., :VOCAB], expected["logits"], rtol=0, atol=1e-6)


def test_what_we_write_is_what_megatron_wrote(real: Source, tmp_path: Path) -> None:
    save_megatron(real, tmp_path / "out", checks=QUIET)
    assert contents(tmp_path / "out") == [
        "latest_checkpointed_iteration.txt",
        "release",
        "release/mp_rank_00",
        f"release/mp_rank_00/{FILE}",
    ]
    theirs = open_torch_file(REAL / "iter_0000005/mp_rank_00" / FILE)
    assert isinstance(theirs["args"].model_type, Inert), "an enum of a package that is not installed"
    expected = {name: stored.read() for name, stored in theirs["model"].items() if stored is not None}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        expected[name][VOCAB:] = 0  # padding
    ours = read(tmp_path / "out/release/mp_rank_00" / FILE)
    assert_bit_equal(dict(ours["model"]), expected)
    for name, value in vars(ours["args"]).items():
        known = getattr(theirs["args"], name, value)
        assert value == known or name in ("moe_layer_freq", "iteration", "hidden_dropout", "attention_dropout"), name


@pytest.mark.parametrize(
    ("tp", "ep", "spelling"), [(1, 1, "te"), (2, 1, "local"), (1, 4, "te"), (2, 2, "te"), (2, 4, "local")]
)
def test_every_layout(real: Source, tp: int, ep: int, spelling: str, tmp_path: Path) -> None:
    save_megatron(real, tmp_path / "out", tp=tp, ep=ep, spelling=spelling, checks=QUIET)
    files = sorted(path.parent.name for path in tmp_path.rglob(FILE))
    assert len(files) == tp * ep and files[-1] == f"mp_rank_{tp - 1:02d}" + (f"_{ep - 1:03d}" if ep > 1 else "")
    first = read(tmp_path / "out/release" / files[0] / FILE)["model"]
    experts = "local_experts.0.linear_fc1.weight" if spelling == "local" else "linear_fc1.weight0"
    assert first[f"decoder.layers.1.mlp.experts.{experts}"].shape == (24 // tp, 16)
    fused = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in first
    assert fused == (spelling == "te") and "decoder.layers.1.pre_mlp_layernorm.weight" in first
    back = load_megatron(tmp_path / "out", vocab_size=VOCAB)
    assert_bit_equal(native_tensors(back), native_tensors(real))


def test_experts_that_are_not_cut(real: Source, tmp_path: Path) -> None:
    """TP 2 x EP 2 with --expert-tensor-parallel-size 1 on two ranks: rank (1, 0) and rank (0, 1) do not exist."""
    save_megatron(real, tmp_path / "cut", tp=2, checks=QUIET)
    save_megatron(real, tmp_path / "whole", ep=2, checks=QUIET)
    for rank in range(2):
        state = read(tmp_path / f"cut/release/mp_rank_0{rank}" / FILE)
        experts = read(tmp_path / f"whole/release/mp_rank_00_00{rank}" / FILE)["model"]
        state["model"] = {name: value for name, value in state["model"].items() if ".experts." not in name}
        state["model"] |= {name: value for name, value in experts.items() if ".experts." in name}
        state["args"].expert_model_parallel_size, state["args"].expert_tensor_parallel_size = 2, 1
        folder = tmp_path / f"both/iter_0000001/mp_rank_0{rank}_00{rank}"
        folder.mkdir(parents=True)
        torch.save(state, folder / FILE)
    assert_bit_equal(native_tensors(load_megatron(tmp_path / "both", 1, VOCAB)), native_tensors(real))


def test_to_native_and_back(real: Source, tmp_path: Path) -> None:
    save_native(real, tmp_path / "native", checks=QUIET)
    native = load_native(tmp_path / "native")
    assert_bit_equal(native_tensors(native), native_tensors(real))
    save_megatron(native, tmp_path / "back", tp=2, ep=2, checks=QUIET)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "llama"])
def test_from_hugging_face(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.convert.tiny import VOCAB as TINY
    from tests.convert.tiny import save_tiny

    save_tiny(tmp_path / "hf", family, torch.bfloat16)
    source = load_hf(tmp_path / "hf")
    save_megatron(source, tmp_path / "megatron", tp=2, ep=1 if family == "llama" else 2, spelling="te", checks=QUIET)
    back = load_megatron(tmp_path / "megatron", vocab_size=TINY)
    assert_bit_equal(native_tensors(back), native_tensors(source))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


def test_refused(real: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def copy(name: str) -> tuple[Path, Any]:
        folder = tmp_path / name
        shutil.copytree(REAL, folder)
        file = folder / "iter_0000005/mp_rank_00" / FILE
        content = torch.load(file, weights_only=False, pickle_module=_Tolerant)
        del content["args"].model_type  # its class is not installed here
        return file, content

    expert = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"
    file, content = copy("deleted")
    del content["model"][expert]
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"{expert} or .*linear_fc2.weight3 is missing.*copy them again"):
        load_megatron(tmp_path / "deleted", vocab_size=VOCAB)

    file, content = copy("surplus")
    content["model"]["decoder.layers.2.input_layernorm.weight"] = torch.ones(16)
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"decoder.layers.2.input_layernorm.weight is left over: the model is"):
        load_megatron(tmp_path / "surplus", vocab_size=VOCAB)

    file, content = copy("rows")
    del content["model"]["embedding.word_embeddings.weight"]
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight is missing or empty: files are missing"):
        load_megatron(tmp_path / "rows", vocab_size=VOCAB)

    file, content = copy("shape")
    content["model"][expert] = torch.ones(16, 11)
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"{expert} is .*\(16, 11\).* should have shape \[16, 12\]"):
        load_megatron(tmp_path / "shape", vocab_size=VOCAB)

    file, content = copy("setting")
    content["args"].multi_latent_attention = True
    content["args"].position_embedding_type = "yarn"
    torch.save(content, file)
    with pytest.raises(
        CheckpointError, match=r"multi_latent_attention \(True\) must be False; .*yarn.* must be one of"
    ):
        load_megatron(tmp_path / "setting")

    file, content = copy("evil")
    torch.save(content | {"opt_param_scheduler": Evil()}, file)
    with pytest.raises(CheckpointError, match=r"holds objects of builtins.print|__builtin__.print.*for safety"):
        load_megatron(tmp_path / "evil")
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"damaged, or not a file of torch\.save"):
        load_megatron(tmp_path / "evil")
    assert "never be printed" not in capsys.readouterr().out

    file, _ = copy("truncated")
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_megatron(tmp_path / "truncated")

    with pytest.raises(CheckpointError, match=r"--vocab-size \(1000\) must be from 1 to 128"):
        load_megatron(REAL, vocab_size=1000)
    with pytest.raises(CheckpointError, match=r"neither mp_rank_\* folders nor a valid"):
        load_megatron(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="4 experts cannot be spread over 3 ranks"):
        save_megatron(real, tmp_path / "out", ep=3, checks=QUIET)
    with pytest.raises(CheckpointError, match="2 query groups cannot be cut over 4 ranks"):
        save_megatron(real, tmp_path / "out", tp=4, checks=QUIET)
    post = load_megatron(REAL)
    post.cfg.model.apply_residual_connection_post_layernorm = True
    with pytest.raises(CheckpointError, match="apply-residual-connection-post-layernorm has no place"):
        save_megatron(post, tmp_path / "out", checks=QUIET)
    for size in (0, -1):
        with pytest.raises(CheckpointError, match=rf"--target-tensor-parallel-size \({size}\) must be at least 1"):
            save_megatron(real, tmp_path / "out", tp=size, checks=QUIET)
        with pytest.raises(CheckpointError, match=rf"--target-expert-parallel-size \({size}\) must be at least 1"):
            save_megatron(real, tmp_path / "out", ep=size, checks=QUIET)
    save_megatron(real, tmp_path / "incomplete", tp=2, checks=QUIET)
    shutil.rmtree(tmp_path / "incomplete/release/mp_rank_01")
    with pytest.raises(CheckpointError, match=r"the file of tensor-parallel rank 1 is missing: copy all mp_rank_\*"):
        load_megatron(tmp_path / "incomplete")
    (tmp_path / "stages/iter_0000001/mp_rank_00_001_000").mkdir(parents=True)
    shutil.copy(REAL / "iter_0000005/mp_rank_00" / FILE, tmp_path / "stages/iter_0000001/mp_rank_00_001_000" / FILE)
    with pytest.raises(CheckpointError, match="pipeline stages: save it again with --pipeline-model-parallel-size 1"):
        load_megatron(tmp_path / "stages", 1)


class _Tolerant:
    """pickle, but with stand-ins for classes of packages that are not installed. For files of this folder only."""

    __name__ = "tolerant"

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Inert if module.startswith("megatron") else super().find_class(module, name)


def test_names_that_other_programs_give(real: Source, tmp_path: Path) -> None:
    """Wrappers' ``module.`` in front, experts of GroupedMLP, the size of the vocabulary in args."""
    save_megatron(real, tmp_path / "m", checks=QUIET)
    file = tmp_path / "m/release/mp_rank_00" / FILE
    content = read(file)
    model, args = content["model"], content["args"]

    def load(model: dict[str, Any], **changes: Any) -> Source:
        torch.save(content | {"model": model, "args": argparse.Namespace(**(vars(args) | changes))}, file)
        return load_megatron(tmp_path / "m")

    wrapped = load({f"module.module.{name}": value for name, value in model.items()}, vocab_size=VOCAB)
    assert wrapped.cfg.model.vocab_size == VOCAB
    assert_bit_equal(native_tensors(wrapped), native_tensors(real))
    assert load(model).cfg.model.vocab_size == load(model, vocab_size=10**6).cfg.model.vocab_size == 128
    grouped = {name: value for name, value in model.items() if "local_experts" not in name}
    grouped["decoder.layers.1.mlp.experts.weight1"] = torch.zeros(32, 8)
    with pytest.raises(
        CheckpointError, match="GroupedMLP's weight1 and weight2, which are not read here: save it again"
    ):
        load(grouped)
