"""Swin from and to other frameworks: to the bit, and the same logits as transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor

from megatron_lsh.commands import convert_checkpoint
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.convert import load_native
from megatron_lsh.convert.safetensors import SafetensorsWriter
from megatron_lsh.convert.swin import SwinSource, load_huggingface, load_microsoft, load_timm, save_huggingface
from megatron_lsh.convert.swin_names import from_huggingface, to_huggingface, to_microsoft
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.swin import SwinModel
from tests.models.model_helpers import randomize
from tests.models.swin_helpers import make_pictures, make_swin, swin_config

FLAGS = "--img-h 32 --swin-depths 2 2 --hidden-size 32 --swin-window-size 4 --init-method-std 0.2 "
MOE = FLAGS + "--num-experts 4 --disable-bias-fc2 --moe-aux-loss-coeff 1e-2 "


def microsofts(flags: str) -> tuple[SwinModel, SwinConfig, dict[str, Tensor]]:
    cfg = swin_config(flags)
    model = randomize(make_swin(cfg)).eval()
    theirs = to_microsoft(model.state_dict(), lambda stage: cfg.heads()[stage])
    for stage, part in model.stages.items():  # buffers of their files
        for number, block in part.layers.items():
            wide = 2 * block.windows.side - 1
            theirs[f"layers.{stage}.blocks.{number}.attn.relative_coords_table"] = torch.zeros(1, wide, wide, 2)
    return model, cfg, theirs


def same(source: SwinSource, model: SwinModel) -> None:
    expected = model.state_dict()
    assert set(source.weights) == set(expected)
    for name, value in expected.items():
        assert torch.equal(source.weights[name], value), name


def write_release(path: Path, theirs: dict[str, Tensor], ranks: int, slices: int = 1) -> Path:
    """As Microsoft's save_checkpoint cuts a model: experts by rank, or slices of them, and the rest."""
    experts = {name: value for name, value in theirs.items() if ".experts." in name}
    torch.save({"model": {n: v for n, v in theirs.items() if n not in experts}}, f"{path}.master")
    for rank in range(ranks):
        mine = {}
        for name, value in experts.items():
            parts = value.reshape(value.shape[0] * slices, value.shape[1] // slices, *value.shape[2:])
            mine[name] = parts.chunk(ranks)[rank].clone()
        torch.save({"model": mine}, f"{path}.rank{rank}")
    return path


@pytest.mark.parametrize(("ranks", "slices", "router"), [(2, 1, "linear"), (4, 1, "cosine"), (8, 2, "linear")])
def test_a_release_of_experts_by_rank_is_read_to_the_bit(tmp_path: Path, ranks: int, slices: int, router: str) -> None:
    model, cfg, theirs = microsofts(MOE + f"--moe-router-type {router}")
    block = "layers.1.blocks.1.mlp._moe_layer.experts.batched_fc2_bias"
    release = write_release(tmp_path / "swin.pth", theirs | {block: torch.zeros(4, 64)}, ranks, slices)
    source = load_microsoft(release, image_size=32)
    same(source, model)
    assert (source.cfg.moe.num_experts, source.cfg.moe.moe_router_type, source.cfg.swin.img_h) == (4, router, 32)
    words = ["--from", "microsoft", "--to", "native", "--image-size", "32", "--quiet"]
    assert convert_checkpoint.main([*words, "--load", str(release), "--save", str(tmp_path / "native")]) == 0
    again = load_native(tmp_path / "native")
    assert isinstance(again.cfg, SwinConfig) and again.cfg.heads() == cfg.heads()
    assert all(torch.equal(again.read(again.pieces(n)[0]), v) for n, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match="has experts, and Hugging Face's Swin has none"):
        save_huggingface(again, tmp_path / "hf")


@pytest.mark.parametrize("folder", ["released", "whole_ranks"])
def test_what_microsofts_own_code_saved_is_read(tmp_path: Path, folder: str) -> None:
    """Files that save_checkpoint of Swin-Transformer f82860b (utils_moe.py) wrote on two ranks, as for a release and as a
    run does, which adds the optimizer's state and a configuration of a class of yacs.
    Tensor i of the model holds i + n % 251 / 8."""
    with ZipFile(Path(__file__).with_name("microsoft_swin.zip")) as recorded:
        recorded.extractall(tmp_path)
    names = json.loads((tmp_path / "names.json").read_text())
    source = load_microsoft(tmp_path / folder / "ckpt_epoch_7.pth", image_size=8)
    assert (source.cfg.moe.num_experts, source.cfg.swin.swin_depths, source.cfg.moe.moe_layer_freq) == (
        4,
        [1, 2],
        "[0,0,1]",
    )
    theirs = to_microsoft(source.weights, lambda stage: source.cfg.heads()[stage])
    for number, (name, shape) in enumerate(names.items()):
        if name in theirs:  # second biases of experts are zero and left out
            expected = (torch.arange(theirs[name].numel()) % 251).float() / 8 + number
            assert torch.equal(theirs[name], expected.reshape(shape)), name
    assert {name for name in names if name not in theirs} == {n for n in names if n.endswith("batched_fc2_bias")}


def test_files_that_lack_something_are_refused_by_name(tmp_path: Path) -> None:
    _, _, theirs = microsofts(MOE)
    path = write_release(tmp_path / "swin.pth", theirs, 3 - 1)
    (tmp_path / "swin.pth.rank0").rename(tmp_path / "swin.pth.rank2")
    with pytest.raises(CheckpointError, match=r"rank0 is not there"):
        load_microsoft(path)
    with pytest.raises(CheckpointError, match=r"give --load NAME.pth"):
        load_microsoft(tmp_path / "nothing.pth")
    del theirs["norm.bias"]
    torch.save({"model": theirs}, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"final_layernorm\.bias is missing"):
        load_microsoft(tmp_path / "cut.pth")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is this another model"):
        load_microsoft(tmp_path / "other.pth")


def test_timms_names_old_and_new(tmp_path: Path) -> None:
    model, _, theirs = microsofts(FLAGS + "--swin-position-bias table")
    theirs = {name: value for name, value in theirs.items() if "coords" not in name}
    old = {name.replace("head.", "head.fc."): value for name, value in theirs.items()}
    new = {name.replace("layers.0.downsample", "layers.1.downsample"): value for name, value in old.items()}
    for number, state in enumerate((old, new)):
        torch.save(state, tmp_path / f"{number}.pth")
        same(load_timm(tmp_path / f"{number}.pth", 32), model)


@pytest.mark.parametrize("bias", ["table", "mlp"])
def test_huggingface_and_back(tmp_path: Path, bias: str) -> None:
    """Tables come back to the bit; a position network as the table that it computes. transformers finds our logits."""
    transformers = pytest.importorskip("transformers")
    model, cfg, theirs = microsofts(FLAGS + f"--swin-position-bias {bias}")
    theirs = {name: value for name, value in theirs.items() if "coords" not in name}
    if bias == "table":
        there = from_huggingface(to_huggingface(theirs))
        assert all(torch.equal(there[name], value) for name, value in theirs.items()) and set(there) == set(theirs)
    save_huggingface(SwinSource("model", microsofts(FLAGS + f"--swin-position-bias {bias}")[2], 32), tmp_path / "hf")
    if bias == "table":
        same(load_huggingface(tmp_path / "hf"), model)
        for source, target, name in (("hf", "native", "ours"), ("native", "hf", "theirs")):
            here = tmp_path / ("hf" if source == "hf" else "ours")
            words = ["--from", source, "--to", target, "--load", str(here), "--save", str(tmp_path / name), "--quiet"]
            assert convert_checkpoint.main(words) == 0
        files = [tmp_path / name / "model.safetensors" for name in ("hf", "theirs")]
        assert files[0].read_bytes() == files[1].read_bytes()
    reference = transformers.SwinForImageClassification.from_pretrained(tmp_path / "hf").eval()
    images, _ = make_pictures(cfg, 2)
    with torch.no_grad():
        logits = reference((images / 255.0 - model.mean) / model.std).logits
        torch.testing.assert_close(model(images)[0], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    ["--ffn-hidden-size 64", "--swiglu --ffn-hidden-size 128", "--normalization RMSNorm", "--norm-epsilon 1e-2",
     "--openai-gelu", "--disable-bias-linear"],
)  # fmt: skip
def test_layers_that_hugging_face_does_not_have_are_not_exported(tmp_path: Path, flags: str) -> None:
    cfg = swin_config(FLAGS + "--swin-position-bias table " + flags)
    source = SwinSource("model", microsofts(FLAGS + "--swin-position-bias table")[2], 32)
    source.cfg.model = cfg.model
    with pytest.raises(CheckpointError, match=r"model: model\.\w+ \(.*\) must be .*, as in every Swin of Hugging Face"):
        save_huggingface(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_hugging_faces_own_settings(tmp_path: Path) -> None:
    """Height and width, several files, and an epsilon that half of its norms would not use."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": [32, 48], "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2]}
    config = transformers.SwinConfig(**sizes, window_size=4, num_labels=10)
    reference = transformers.SwinForImageClassification(config).eval()
    reference.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    source = load_huggingface(tmp_path / "hf")
    assert (source.cfg.swin.img_h, source.cfg.swin.img_w) == (32, 48)
    reference.save_pretrained(tmp_path / "one")
    (file,) = (tmp_path / "one").glob("*.safetensors")
    whole = load_huggingface(file.parent).weights
    assert source.weights.keys() == whole.keys() and all(torch.equal(source.weights[n], whole[n]) for n in whole)
    config.layer_norm_eps = 1e-2
    config.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"layer_norm_eps \(0.01\) must be 1e-05"):
        load_huggingface(tmp_path / "hf")


def test_what_is_written_for_hugging_face_is_compared_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a disk that flips a bit in every file that is closed."""
    torch.save({"model": microsofts(FLAGS)[2]}, tmp_path / "swin.pth")
    words = ["--from", "microsoft", "--to", "hf", "--image-size", "32", "--load", str(tmp_path / "swin.pth")]
    real = SafetensorsWriter.finish

    def finish(writer: SafetensorsWriter) -> None:
        real(writer)
        with open(writer._folder / "model.safetensors", "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)[0]
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last ^ 1]))

    monkeypatch.setattr(SafetensorsWriter, "finish", finish)
    assert convert_checkpoint.main([*words, "--save", str(tmp_path / "hf")]) == 1
    assert "differs from what was read: the disk is at fault" in capfd.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert convert_checkpoint.main([*words, "--save", str(tmp_path / "hf"), "--no-verify"]) == 0
    assert "WARNING: --no-verify" in capfd.readouterr().err and (tmp_path / "hf").is_dir()


@torch.no_grad()
def test_a_dense_swin_becomes_a_mixture_that_begins_as_the_same_function(tmp_path: Path) -> None:
    model, cfg, theirs = microsofts(FLAGS)
    torch.save({"model": theirs}, tmp_path / "dense.pth")
    words = ["--from", "microsoft", "--to", "native", "--image-size", "32", "--quiet", "--moe-use-upcycling"]
    words += ["--load", str(tmp_path / "dense.pth"), "--num-experts", "4"]
    images, _ = make_pictures(cfg)
    expected = model(images)[0]
    for number, flags in enumerate((["--moe-upcycling-granularity", "2"], ["--moe-layer-freq", "[0,1,0,1]"])):
        save = tmp_path / str(number)
        assert convert_checkpoint.main([*words, *flags, "--save", str(save)]) == 0
        source = load_native(save)
        assert isinstance(source.cfg, SwinConfig) and source.cfg.moe.num_experts == 4
        mixture = make_swin(source.cfg).eval()
        assert sum(1 for _ in mixture.moe_layers()) == 2  # block 1 of both stages
        mixture.load_state_dict(
            {name: torch.cat([source.read(piece) for piece in source.pieces(name)]) for name in source.tensors}
        )
        torch.testing.assert_close(mixture(images)[0], expected, rtol=0, atol=2e-5)
    assert convert_checkpoint.main([*words, "--moe-router-topk", "1", "--save", str(tmp_path / "one")]) == 1
