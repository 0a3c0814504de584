"""Hugging Face folders: reading both layouts, writing the hub's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.config import Config
from megatron_lsh.convert.files import read_json, write_json
from megatron_lsh.convert.hf_config import (
    choose_family,
    folded_multipliers,
    further_layers,
    misfits,
    read_hf_config,
    write_hf_config,
)
from megatron_lsh.convert.safetensors import FLOATS, SafetensorsReader, SafetensorsWriter
from megatron_lsh.convert.source import (
    VOCABULARY,
    Origin,
    Rows,
    Source,
    TensorSpec,
    all_pieces,
    fail,
    model_shapes,
    required_vocab,
    row_by_row,
    whole,
)
from megatron_lsh.convert.tables import (
    IGNORED,
    Family,
    Row,
    fused_name,
    hub_names,
    layer_of,
    per_expert,
)
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.shape import ModelShape

INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
_COMPLETE = "the checkpoint is incomplete or of another model; download it again"


class HuggingFaceSource:
    """A folder that ``save_pretrained`` wrote or that was downloaded from the hub. Reads headers only, at first.

    Args:
        max_position_embeddings: the model is to be used for contexts of this length only.
        ignored: keys of config.json, unknown here, of which the user knows that they change nothing.

    Raises CheckpointError: an unsupported architecture or setting, a missing file, a tensor that is missing, left over or
    of a wrong shape, each by name.
    """

    def __init__(
        self, folder: str | Path, max_position_embeddings: int | None = None, ignored: Collection[str] = ()
    ) -> None:
        folder = Path(folder)
        self.what = str(folder)
        where = folder / "config.json"
        config = read_json(where, "--load takes a folder with the files of one Hugging Face model")
        self.family, self.cfg, self.notices = read_hf_config(config, str(where), max_position_embeddings, ignored)
        self._factors = folded_multipliers(config, str(where), self.family, self.cfg)
        self._further = further_layers(config, str(where), self.family)
        self._tied = bool(config.get("tie_word_embeddings"))
        self._model = ModelShape.from_config(self.cfg.model)
        files, notices = weight_files(folder)
        self.notices += notices
        self._reader = SafetensorsReader(files)
        self._rows: dict[str, tuple[Row, int]] = {}
        self._whole: dict[str, str] = {}  # native tensors that the files hold as they are -> their names there
        self.tensors: dict[str, TensorSpec] = {}
        dtypes = self._account()
        self.origin = Origin(config, small_files(folder), dtypes)

    def pieces(self, name: str) -> list[Rows]:
        spec = self.tensors[name]
        if name in VOCABULARY:
            return vocabulary_pieces(name, spec, required_vocab(self.cfg))
        return row_by_row(name, spec) if ".experts." in name else whole(name, spec)

    def read(self, rows: Rows) -> Tensor:
        spec = self.tensors[rows.name]
        if rows.name in VOCABULARY and rows.first >= required_vocab(self.cfg):
            return torch.zeros(rows.count, *spec.shape[1:], dtype=spec.dtype)
        row, layer = self._rows[rows.name]
        if rows.name in self._whole:
            return self._scaled(rows.name, [self._reader.read(self._whole[rows.name], rows.first, rows.count)])[0]
        if not per_expert(row):
            parts = [self._reader.read(name).to(spec.dtype) for name in hub_names(row, layer)]
            return row.layout.join(self._scaled(rows.name, parts), self._model)
        experts = []
        for expert in range(rows.first, rows.first + rows.count):
            parts = [self._reader.read(name).to(spec.dtype) for name in hub_names(row, layer, expert)]
            experts.append(row.layout.join(parts, self._model))
        return experts[0].unsqueeze(0) if len(experts) == 1 else torch.stack(experts)

    def _scaled(self, native: str, parts: list[Tensor]) -> list[Tensor]:
        """With the family's multipliers folded in; of queries, keys and values, the queries."""
        factor = self._factor(native)
        return parts if factor is None else [parts[0].float() * factor, *parts[1:]]

    def _factor(self, native: str) -> float | None:
        return next((factor for end, factor in self._factors.items() if native.endswith(end)), None)

    def culprits(self, rows: Rows) -> list[str]:
        row, layer = self._rows[rows.name]
        if rows.name in self._whole:
            return [self._whole[rows.name]]
        experts = range(rows.first, rows.first + rows.count) if per_expert(row) else [None]
        names = [name for expert in experts for name in hub_names(row, layer, expert)]
        return [name for name in names if not torch.isfinite(self._reader.read(name)).all()]

    def _account(self) -> dict[str, torch.dtype]:
        """Match the files' tensors with the model's, whole and exactly. Returns the types that differ within a tensor."""
        found = self._reader.tensors
        problems: list[str] = []
        used: set[str] = set()
        dtypes: dict[str, torch.dtype] = {}
        for native, shape in model_shapes(self.cfg, len(found) + len(self._reader.others)).items():
            match = self.family.row(native)
            if match is None:
                raise CheckpointError(f"{self.what}: a {self.family.model_type} has no {native}: report this as a bug")
            self._rows[native] = match
            expected = self._expected(native, shape)
            parts = {name: found[name] for name in expected if name in found}
            absent = [name for name in expected if name not in found and name not in self._reader.others]
            problems += [f"{name} is missing" for name in absent]
            problems += [
                f"{name} in {self._reader.file_of(name).name} has shape {list(part.shape)} and should have "
                f"{list(expected[name])}"
                for name, part in parts.items()
                if part.shape != expected[name]
            ]
            used |= set(parts)
            kinds = [part.dtype for part in parts.values()]
            dtype = reduce(torch.promote_types, kinds) if kinds else torch.float32
            if self._factor(native) is not None:
                dtype = torch.float32
            else:
                dtypes |= {name: part.dtype for name, part in parts.items() if part.dtype != dtype}
            self.tensors[native] = TensorSpec(shape, dtype)
        problems += [
            f"{name} in {self._reader.file_of(name).name} is of type {kind}, which must be one of {', '.join(FLOATS)}: "
            "quantized models are not supported"
            for name, kind in self._reader.others.items()
            if not IGNORED.fullmatch(name)
        ]
        extra = [name for name in found if name not in used and not IGNORED.fullmatch(name)]
        if "lm_head.weight" in extra and self._repeats_embedding():
            extra.remove("lm_head.weight")
        further = [name for name in extra if layer_of(name) in self._further]
        if further:
            extra = [name for name in extra if layer_of(name) not in self._further]
            self.notices.append(
                f"{self.what}: {len(further)} tensors of layers that predict further tokens are left out"
            )
        problems += [f"{name} in {self._reader.file_of(name).name} is left over" for name in extra]
        missing = any(problem.endswith(" is missing") for problem in problems)
        fail(
            self.what, problems, _COMPLETE if missing else "the tensors are not of the model that config.json describes"
        )
        return dtypes

    def _expected(self, native: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name and shape of what the files should hold of a native tensor. Notes where they hold it as it is."""
        row, layer = self._rows[native]
        fused = fused_name(row, layer)
        if fused is not None and fused in self._reader.tensors:
            self._whole[native] = fused
        elif ".experts." in native and not per_expert(row):
            (self._whole[native],) = hub_names(row, layer)
        elif native == "output_layer.weight" and self._tied:
            self._whole[native] = "model.embed_tokens.weight"
        if native not in self._whole:
            if per_expert(row) and shape[0] > len(self._reader.tensors):
                raise CheckpointError(f"{self.what}: {shape[0]} experts are not in these files: {_COMPLETE}")
            return hub_shapes(self.family, native, shape, self.cfg)
        if native in VOCABULARY:
            shape = (required_vocab(self.cfg), *shape[1:])
        return {self._whole[native]: shape}

    def _repeats_embedding(self) -> bool:
        """Whether an output layer that the settings tie to the embedding is stored a second time, and equal."""
        if not self._tied:
            return False
        output, embedding = self._reader.read("lm_head.weight"), self._reader.read("model.embed_tokens.weight")
        if not torch.equal(output, embedding):
            raise CheckpointError(
                f"{self.what}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties them: "
                "set tie_word_embeddings to false there"
            )
        self.notices.append(f"{self.what}: lm_head.weight repeats the tied embedding and is dropped")
        return True


def vocabulary_pieces(name: str, spec: TensorSpec, vocab: int) -> list[Rows]:
    """The rows of real tokens, then the padding, if there is any."""
    padding = spec.shape[0] - vocab
    return [Rows(name, 0, vocab)] + ([Rows(name, vocab, padding)] if padding else [])


def hub_shapes(family: Family, native: str, shape: tuple[int, ...], cfg: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the hub layout that the native tensor `native` holds, in its order.

    Raises CheckpointError if the family has no such tensor.
    """
    match = family.row(native)
    if match is None:
        raise CheckpointError(f"{native} has no place in a {family.model_type}: the model cannot be exported as one")
    row, layer = match
    model = ModelShape.from_config(cfg.model)
    if native in VOCABULARY:
        shape = (required_vocab(cfg), *shape[1:])
    if not per_expert(row):
        return dict(zip(hub_names(row, layer), row.layout.shapes(shape, model), strict=True))
    result: dict[str, tuple[int, ...]] = {}
    for expert in range(shape[0]):
        result |= zip(hub_names(row, layer, expert), row.layout.shapes(shape[1:], model), strict=True)
    return result


def hub_specs(source: Source, family: Family) -> dict[str, TensorSpec]:
    """All tensors of the hub layout that a source becomes, in the order in which they are written."""
    return {
        name: TensorSpec(shape, source.origin.dtypes.get(name, spec.dtype))
        for native, spec in source.tensors.items()
        for name, shape in hub_shapes(family, native, spec.shape, source.cfg).items()
    }


def hub_tensors(source: Source, family: Family, rows: Rows, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the hub layout in some rows of a native tensor."""
    match = family.row(rows.name)
    assert match is not None
    row, layer = match
    model = ModelShape.from_config(source.cfg.model)
    if rows.name in VOCABULARY:
        value = value[: max(required_vocab(source.cfg) - rows.first, 0)]
        if not value.shape[0]:
            return
    slices = enumerate(value, rows.first) if per_expert(row) else [(None, value)]
    for expert, part in slices:
        for name, tensor in zip(hub_names(row, layer, expert), row.layout.split(part, model), strict=True):
            yield name, tensor.to(source.origin.dtypes.get(name, tensor.dtype))


class HuggingFaceWriter:
    """Writes a source as a folder in the hub layout.

    Args:
        model_type: the family; by default that of the source's own config.json if it fits, else the first that does.
        max_shard: bytes per file.

    Raises CheckpointError if the model is of no family.
    """

    def __init__(self, source: Source, folder: Path, model_type: str | None = None, max_shard: int = 5 * 10**9) -> None:
        self._source = source
        self._folder = folder
        self.family = _family(source, model_type)
        self.specs = hub_specs(source, self.family)
        self._config = self._checked_config()
        self._writer = SafetensorsWriter(folder, self.specs, max_shard)

    def write(self, read: Callable[[Rows], Tensor]) -> None:
        """Write all tensors; ``read(rows)`` gives each piece, in order. Raises OSError and what `read` raises."""
        with self._writer:
            for rows in all_pieces(self._source):
                for name, tensor in hub_tensors(self._source, self.family, rows, read(rows)):
                    self._writer.write(name, tensor)
            self._writer.finish()

    def _checked_config(self) -> dict[str, Any]:
        """config.json, which reads back as the model that it was written for, whatever was taken over from the origin's."""
        origin = self._source.origin
        sizes: dict[torch.dtype, int] = {}
        for spec in self.specs.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        dtype = str(max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.")
        same = origin.hf_config if origin.hf_config.get("model_type") == self.family.model_type else {}
        tokens = {key: value for key, value in origin.hf_config.items() if key.endswith("_token_id")}
        config = write_hf_config(self._source.cfg, self.family, dtype, {**tokens, **same})
        reasons = misfits(self._source.cfg, self.family, config)
        if reasons:
            raise CheckpointError(
                f"{self._source.what}: config.json would describe another model: {'; '.join(reasons)}"
            )
        return config

    def finish(self) -> None:
        """Write the small files. Raises OSError."""
        config = self._config
        self._source.origin.copy_files(self._folder)
        write_json(self._folder / "config.json", config)
        generation = self._folder / "generation_config.json"
        if not generation.exists():
            ids = {
                key: config[key]
                for key in ("bos_token_id", "eos_token_id", "pad_token_id")
                if config.get(key) is not None
            }
            write_json(generation, {"_from_model_config": True, **ids})


def _family(source: Source, model_type: str | None) -> Family:
    own = source.origin.hf_config.get("model_type")
    if model_type is None and own is not None:
        try:
            return choose_family(source.cfg, own)
        except CheckpointError:  # trained on as another architecture: upcycled, for one
            pass
    return choose_family(source.cfg, model_type)


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of weights that transformers would read, and a notice if there are others."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.exists():
        return [single], [f"{index} is passed over, as transformers does: {single} is there"] if index.exists() else []
    if not index.exists():
        other = [path.name for path in folder.iterdir() if path.suffix in _WEIGHTS]
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor {INDEX}"
            + (f" (but {', '.join(sorted(other)[:3])})" if other else "")
            + ": only safetensors are read; save the model again with save_pretrained of a recent transformers"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again")
    files = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    fail(str(index), [f"the shard {name} is not there" for name in missing], "download the missing files")
    return [folder / name for name in files], []


def small_files(folder: Path) -> dict[str, Path]:
    """Name -> path of the files copied with the weights: tokenizer, generation_config.json and the like."""
    return {path.name: path for path in sorted(folder.iterdir()) if _belongs_along(path)}


def _belongs_along(path: Path) -> bool:
    """Neither weights nor what is written anew."""
    return (
        path.is_file()
        and path.name not in ("config.json", INDEX)
        and not path.name.startswith(".")
        and path.suffix in (".json", ".model", ".txt", ".jinja", ".tiktoken")
        and not path.name.endswith(".index.json")
    )
