"""Swin and Swin-MoE from Microsoft's files, Hugging Face's and timm's, and dense ones to Hugging Face's.

Microsoft's release of a Swin-MoE is ``NAME.pth.master`` and ``NAME.pth.rank0`` ... (the experts of each rank), a dense
model ``NAME.pth`` or ``NAME.pth.global``, each ``{"model": tensors}``. All are read by torch's weights-only unpickler. A
model is held in memory as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.config import required
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.config.swin_presets import PRESETS
from megatron_lsh.convert.files import read_json, write_json
from megatron_lsh.convert.hf import weight_files
from megatron_lsh.convert.output import new_folder
from megatron_lsh.convert.safetensors import SafetensorsReader, SafetensorsWriter
from megatron_lsh.convert.source import (
    Origin,
    Rows,
    Source,
    TensorSpec,
    bytes_of,
    check_shapes,
    fail,
    model_shapes,
    whole,
)
from megatron_lsh.convert.swin_names import (
    Tensors,
    from_huggingface,
    from_microsoft,
    from_timm,
    to_huggingface,
    to_microsoft,
)
from megatron_lsh.convert.torch_file import StoredTensor, open_torch_file
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.swin import stage_grids
from megatron_lsh.models.windows import Windows

_SHARD = 5 * 10**9
_EXPERT = "mlp._moe_layer.experts.batched_"


class SwinSource:
    """A model in memory as a `Source`.

    Args:
        what: names the files in messages.
        theirs: parameters with Microsoft's names, experts whole.
        image_size: side of the pictures; by default what the windows of the last stage say, or else that of the preset.

    Raises:
        CheckpointError: parameters that are none of a Swin, or do not fit together.
    """

    def __init__(self, what: str, theirs: Mapping[str, Tensor], image_size: int | None = None) -> None:
        self.what = what
        self.cfg = config_of(what, theirs, image_size)
        self.weights = from_microsoft(theirs, lambda stage: self.cfg.heads()[stage])
        shapes = model_shapes(self.cfg)
        check_shapes(what, {name: tuple(value.shape) for name, value in self.weights.items()}, shapes)
        self.tensors = {name: TensorSpec(shapes[name], self.weights[name].dtype) for name in shapes}
        self.origin = Origin()
        self.notices: list[str] = []

    def pieces(self, name: str) -> list[Rows]:
        return whole(name, self.tensors[name])

    def read(self, rows: Rows) -> Tensor:
        return self.weights[rows.name][rows.first : rows.first + rows.count].contiguous()

    def culprits(self, rows: Rows) -> list[str]:
        return [rows.name]


def load_microsoft(path: Path, image_size: int | None = None) -> SwinSource:
    """`path`: a file, or of several the beginning of their names, ``NAME.pth``: of a release, whose master file has what all
    ranks share, or of a run, where every rank's file has that too. Raises CheckpointError."""
    if path.is_file():
        return SwinSource(str(path), _model_in(path), image_size)
    master = path.with_name(path.name + ".master")
    single = path.with_name(path.name + ".global")
    if single.is_file():
        return SwinSource(str(single), _model_in(single), image_size)
    ranks = sorted(path.parent.glob(path.name + ".rank*"), key=lambda file: int(re.sub(r"\D", "", file.suffix) or -1))
    if not ranks:
        raise CheckpointError(
            f"{path} must be a file, or the beginning of NAME.pth.rank0, ... (and NAME.pth.master): give --load NAME.pth"
        )
    missing = [number for number, file in enumerate(ranks) if file.suffix != f".rank{number}"]
    if missing:
        raise CheckpointError(f"{path}.rank{missing[0]} is not there: the experts of every rank are needed")
    parts = [_model_in(rank) for rank in ranks]
    shared = _model_in(master) if master.is_file() else {n: v for n, v in parts[0].items() if ".experts." not in n}
    return SwinSource(str(path), with_experts(shared, parts), image_size)


def with_experts(master: Mapping[str, Tensor], ranks: list[Tensors]) -> Tensors:
    """All parameters, the experts of all ranks in order. Where a rank has a slice of an expert, slices follow each other.

    Raises CheckpointError: ranks with other parameters, or slices that do not make whole experts.
    """
    merged = dict(master)
    names = {name for rank in ranks for name in rank if ".experts." in name}
    for name in sorted(names):
        pieces = [rank[name] for rank in ranks if name in rank]
        if len(pieces) != len(ranks) or len({tuple(piece.shape) for piece in pieces}) != 1:
            raise CheckpointError(
                f"{name} is not in every rank's file, or has several shapes: are all files of one run?"
            )
        gate = name.split("experts.")[0] + "gates.0."
        router, vectors = master.get(gate + "wg.weight"), master.get(gate + "sim_matrix")
        if router is None and vectors is None:
            raise CheckpointError(f"{gate}wg.weight is missing: is the master file of the same run?")
        experts = len(router) if router is not None else vectors.shape[1]  # type: ignore[union-attr]
        stacked = torch.cat(pieces)
        if len(stacked) % experts:
            raise CheckpointError(f"{name} of {len(ranks)} ranks makes {len(stacked)} slices, not {experts} experts")
        merged[name] = stacked.reshape(experts, -1, *stacked.shape[2:])
    return merged


def load_timm(path: Path, image_size: int | None = None) -> SwinSource:
    """A .safetensors file or one of ``torch.save``. Raises CheckpointError."""
    return SwinSource(str(path), from_timm(_model_in(path)), image_size)


def is_huggingface_swin(folder: Path) -> bool:
    """Whether a folder's config.json says that it holds a Swin."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "swin"


def load_huggingface(folder: Path) -> SwinSource:
    """A folder of ``SwinForImageClassification``. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "swin":
        raise CheckpointError(
            f"{folder} holds a {config.get('model_type')} model, not a Swin: give the folder of a Swin by --load"
        )
    for key, usual in (
        ("use_absolute_embeddings", False),
        ("hidden_act", "gelu"),
        ("qkv_bias", True),
        ("mlp_ratio", 4),
        ("layer_norm_eps", 1e-5),  # transformers uses it in some of the norms, and 1e-5 in the others
    ):
        if config.get(key, usual) != usual:
            raise CheckpointError(f"{folder}: {key} ({config[key]}) must be {usual}: such a Swin is not supported")
    size = config.get("image_size")
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(side is None or (type(side) is int and side > 0) for side in sides):
        raise CheckpointError(f"{folder}: image_size ({size!r:.40}) must be a number of pixels, or height and width")
    files, notices = weight_files(folder)
    reader = SafetensorsReader(files)
    source = SwinSource(str(folder), from_huggingface({name: reader.read(name) for name in reader.tensors}), sides[0])
    source.cfg.swin.img_w = sides[1] or source.cfg.swin.img_w
    source.notices += notices
    return source


def save_huggingface(source: Source, folder: Path, *, verify: bool = True) -> None:
    """Write a dense model as a folder of ``SwinForImageClassification``; position networks become their tables.

    Args:
        verify: read back what was written, and compare it to the bit before the folder gets its name.

    Raises CheckpointError: experts, windows of different sides, or another layer than Hugging Face's Swin has; a difference.
    """
    cfg = source.cfg
    assert isinstance(cfg, SwinConfig)
    if cfg.moe.num_experts is not None:
        raise CheckpointError(
            f"{source.what} has experts, and Hugging Face's Swin has none: only dense models are exported"
        )
    model = cfg.model
    for name, usual in (
        ("ffn_hidden_size", 4 * required(model.hidden_size)), ("normalization", "LayerNorm"), ("norm_epsilon", 1e-5),
        ("swiglu", False), ("openai_gelu", False), ("add_bias_linear", True), ("qk_layernorm", False),
    ):  # fmt: skip
        if (value := getattr(model, name)) != usual:
            raise CheckpointError(
                f"{source.what}: model.{name} ({value}) must be {usual}, as in every Swin of Hugging Face, to be exported"
            )
    sides = {Windows.of(*grid, cfg.swin.swin_window_size, shifted=False).side for grid in stage_grids(cfg)}
    if len(sides) > 1:
        raise CheckpointError(
            f"{source.what} has windows of {sorted(sides)} patches, and Hugging Face's Swin one size: only a Swin of larger "
            "--img-h and --img-w, whose last stage has whole windows, is exported"
        )
    ours = {name: source.read(Rows(name, 0, spec.shape[0])) for name, spec in source.tensors.items()}
    theirs = _with_tables(to_microsoft(ours, lambda stage: cfg.heads()[stage]), cfg)
    weights = {name: value.contiguous() for name, value in to_huggingface(theirs).items()}
    config = {
        "architectures": ["SwinForImageClassification"], "model_type": "swin",
        "image_size": cfg.swin.img_h if cfg.swin.img_h == cfg.swin.img_w else [cfg.swin.img_h, cfg.swin.img_w],
        "patch_size": cfg.swin.patch_dim, "num_channels": cfg.swin.num_channels, "embed_dim": cfg.model.hidden_size,
        "depths": cfg.swin.swin_depths, "num_heads": cfg.heads(), "window_size": min(sides), "mlp_ratio": 4.0,
        "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": cfg.model.norm_epsilon,
        "drop_path_rate": cfg.swin.drop_path_rate,
        "id2label": {str(n): f"LABEL_{n}" for n in range(len(theirs["head.bias"]))},
        "label2id": {f"LABEL_{n}": n for n in range(len(theirs["head.bias"]))},
    }  # fmt: skip
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in weights.items()}
    with new_folder(folder, sum(spec.nbytes for spec in specs.values())) as partial:
        with SafetensorsWriter(partial, specs, _SHARD) as writer:
            for name, value in weights.items():
                writer.write(name, value)
            writer.finish()
        write_json(partial / "config.json", config)
        if verify:
            _compare(partial, weights, folder)


def _compare(written: Path, weights: Tensors, folder: Path) -> None:
    """Raises CheckpointError naming what is not in the files to the bit."""
    reader = SafetensorsReader(sorted(written.glob("*.safetensors")))
    wrong = [name for name, value in weights.items() if bytes_of(reader.read(name)) != bytes_of(value)]
    fail(str(folder), [f"{name} differs from what was read" for name in wrong], "the disk is at fault; convert again")


def _with_tables(theirs: Tensors, cfg: SwinConfig) -> Tensors:
    """Tables in the place of position networks, and second biases of zero where there are none."""
    found = {name: value for name, value in theirs.items() if ".cpb_mlp." not in name}
    for name in [name for name in theirs if name.endswith("cpb_mlp.0.weight")]:
        block = name.removesuffix("cpb_mlp.0.weight")
        stage = int(name.split(".")[1])
        windows = Windows.of(*stage_grids(cfg)[stage], cfg.swin.swin_window_size, shifted=False)
        distances = windows.distances(torch.device("cpu"), cfg.pretrained_window_side(stage))
        first, bias, second = (
            theirs[block + part].float() for part in ("cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight")
        )
        table = torch.relu(distances @ first.t() + bias) @ second.t()
        found[block + "relative_position_bias_table"] = table.to(theirs[name].dtype)
    for name in [name for name in theirs if name.endswith("mlp.fc2.weight")]:
        bias_name = name.replace("weight", "bias")
        found.setdefault(bias_name, theirs[name].new_zeros(len(theirs[name])))
    return found


def config_of(what: str, theirs: Mapping[str, Tensor], image_size: int | None = None) -> SwinConfig:
    """The settings of a model, read off its parameters with Microsoft's names. Raises CheckpointError."""
    try:
        return _config_of(theirs, image_size)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{what} lacks parameters of a Swin ({error}): is this another model?") from None


def _config_of(theirs: Mapping[str, Tensor], image_size: int | None) -> SwinConfig:
    blocks = sorted(
        {(int(m[1]), int(m[2])) for name in theirs if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    )
    depths = [sum(stage == number for stage, _ in blocks) for number in range(blocks[-1][0] + 1)]
    table = "layers.0.blocks.0.attn.relative_position_bias_table" in theirs
    heads, sides = [], []
    for stage in range(len(depths)):
        attention = f"layers.{stage}.blocks.0.attn."
        if table:
            heads.append(theirs[attention + "relative_position_bias_table"].shape[1])
            sides.append((math.isqrt(len(theirs[attention + "relative_position_bias_table"])) + 1) // 2)
        else:
            heads.append(len(theirs[attention + "cpb_mlp.2.weight"]))
            distances = theirs.get(attention + "relative_coords_table")
            sides.append(12 if distances is None else (distances.shape[1] + 1) // 2)
    cfg = SwinConfig()
    patches = theirs["patch_embed.proj.weight"]
    cfg.swin.patch_dim, cfg.swin.num_channels = patches.shape[2], patches.shape[1]
    cfg.swin.swin_depths, cfg.swin.swin_num_heads, cfg.swin.swin_window_size = depths, heads, max(sides)
    cfg.swin.swin_position_bias = "table" if table else "mlp"
    cfg.swin.num_classes = len(theirs["head.weight"])
    least = sides[-1] if sides[-1] < max(sides) else None
    usual = least * cfg.swin.patch_dim << (len(depths) - 1) if least else {7: 224, 12: 192}.get(max(sides))
    cfg.swin.img_h = cfg.swin.img_w = image_size or usual or max(sides) * cfg.swin.patch_dim << (len(depths) - 1)
    cfg.model.num_layers, cfg.model.hidden_size = sum(depths), patches.shape[0]
    cfg.model.num_attention_heads = heads[0]
    cfg.model.add_bias_fc2 = any(name.endswith("mlp.fc2.bias") for name in theirs)
    moe = [f"layers.{stage}.blocks.{block}.{_EXPERT}fc1_w" in theirs for stage, block in blocks]
    cfg.moe.moe_layer_freq = "[" + ",".join(str(int(here)) for here in moe) + "]"
    if any(moe):
        stage, block = blocks[moe.index(True)]
        cfg.moe.num_experts = len(theirs[f"layers.{stage}.blocks.{block}.{_EXPERT}fc1_w"])
        _set_like_the_presets(cfg)
        if any(name.endswith("gates.0.sim_matrix") for name in theirs):
            cfg.moe.moe_router_type = "cosine"
    if all(moe):
        raise ValueError("no block without experts")
    first = moe.index(False)
    stage, block = blocks[first]
    cfg.model.ffn_hidden_size = len(theirs[f"layers.{stage}.blocks.{block}.mlp.fc1.bias"]) >> stage
    return cfg


def _set_like_the_presets(cfg: SwinConfig) -> None:
    """What the files do not say and the published Swin-MoE share: the gate, its loss, the capacity."""
    for name, value in PRESETS["swin-moe-s8"].items():
        if name.startswith("moe_"):
            setattr(cfg.moe, name, value)


def _model_in(path: Path) -> Tensors:
    """The tensors of a file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not there: check --load")
    if path.suffix == ".safetensors":
        reader = SafetensorsReader([path])
        return {name: reader.read(name) for name in reader.tensors}
    content: Any = open_torch_file(path)
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no tensors under the name model: is it a checkpoint of a Swin?")
    return {name: value.read() for name, value in content.items() if isinstance(value, StoredTensor)}
