"""Native checkpoints (torch.distributed.checkpoint with a manifest), read and written piece by piece.

Written ones are ``SAVE/release``: weights without a training state, of which a plain ``--load SAVE`` starts iteration 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

import megatron_lsh
from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.compare import started_at_zero, zero_if_absent
from megatron_lsh.checkpoint.lock import LOCK
from megatron_lsh.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    ManifestError,
    check_file,
    hash_file,
    read_manifest,
    sync_folder,
    write_atomically,
    write_manifest,
)
from megatron_lsh.checkpoint.metadata import METADATA, Reader, incomplete
from megatron_lsh.checkpoint.saved import CONFIG, STATE, read_state
from megatron_lsh.checkpoint.saved import read_config as read_saved_config
from megatron_lsh.checkpoint.tensors import MODEL
from megatron_lsh.checkpoint.writer import layout_of
from megatron_lsh.config import Config, from_dict, to_dict
from megatron_lsh.config.data import TOKENIZER_FILES, TOKENIZER_SETTINGS
from megatron_lsh.config.kept_tokenizer import CONVERTED, KEPT, kept_tokenizer, tokenizer_contents
from megatron_lsh.config.serialize import FORMAT_VERSION
from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.convert.files import read_json, write_json
from megatron_lsh.convert.hf import vocabulary_pieces
from megatron_lsh.convert.source import (
    VOCABULARY,
    Origin,
    Rows,
    Source,
    TensorSpec,
    all_pieces,
    check_shapes,
    model_shapes,
    required_vocab,
    whole,
)
from megatron_lsh.convert.tokenizer import export_tokenizer
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.context import offline_context

HF = CONVERTED  # the small files that the model came with
_COMPRESSOR = ".mlp.dispatcher."
_FILE_BYTES = 2**30  # of one data file; several let ranks verify and read in parallel


class NativeSource:
    """A checkpoint of this framework, of any layout; its files are verified against the manifest first.

    Args:
        folder: a save folder, or one checkpoint in it.
        step: the iteration to take, by default what the tracker file says.
        verify: check the SHA-256 of every file.

    Raises CheckpointError: no checkpoint, a damaged file, tensors that are not those of the model in its config.json.
    """

    def __init__(self, folder: str | Path, step: int | None = None, verify: bool = True) -> None:
        self.folder = find_native(Path(folder), step)
        self.what = str(self.folder)
        _verify_manifest(self.folder, verify)
        saved = read_state(self.folder)
        self.cfg = read_config(self.folder)
        self._reader = Reader(self.folder)
        metadata = self._reader.metadata
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored: dict[str, TensorStorageMetadata] = {
            key[len(MODEL) :]: entry
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        self._stored = {name: entry for name, entry in stored.items() if _COMPRESSOR not in name}
        self.notices = list(self.cfg.notices)
        if len(self._stored) < len(stored):
            self.notices.append(
                f"{self.what}: what the token dispatcher learned is left out; the exact model needs none of it"
            )
        shapes = model_shapes(self.cfg)
        zero = zero_if_absent(self._stored, shapes)
        if zero:
            self.notices.append(f"{self.what}: {started_at_zero(zero)}")
        expected = {name: self._unpadded_shape(name, s) for name, s in shapes.items() if name not in zero}
        check_shapes(self.what, self._unpadded(), expected)
        self.tensors = {
            name: TensorSpec(shape, torch.float32 if name in zero else self._stored[name].properties.dtype)
            for name, shape in shapes.items()
        }
        kinds = saved.extra.get("hf_dtypes", {})
        self.origin = self._origin({name: getattr(torch, kind) for name, kind in kinds.items()})

    def _origin(self, dtypes: Mapping[str, torch.dtype]) -> Origin:
        """What the manifest vouches for of the model that it was converted from, or else the tokenizer of the run."""
        names = {entry.name for entry in read_manifest(self.folder).files}
        if f"{HF}/config.json" in names:
            own = {name[len(HF) + 1 :] for name in names if name.startswith(f"{HF}/")} - {"config.json"}
            files = {name: self.folder / HF / name for name in sorted(own)}
            return Origin(read_json(self.folder / HF / "config.json"), files, dtypes)
        strays = [path for path in sorted(self.folder.glob(f"{KEPT}/*")) if f"{KEPT}/{path.name}" not in names]
        if strays:
            raise CheckpointError(
                f"{strays[0]} is no file of this checkpoint, and could change its tokenizer: remove it"
            )
        if not self.cfg.tokenized:
            return Origin({}, {}, dtypes)
        exported = export_tokenizer(self.cfg.data)
        if exported.missing is not None:
            self.notices.append(
                f"{self.what}: an export has neither tokenizer nor end token, because {exported.missing}. --reference takes "
                "the folder of a model that has them"
            )
        return Origin(exported.ids, exported.files, dtypes, exported.tokenizer)

    def pieces(self, name: str) -> list[Rows]:
        if name in VOCABULARY:
            return vocabulary_pieces(name, self.tensors[name], required_vocab(self.cfg))
        if ".experts." in name:
            return [Rows(name, first, last - first) for first, last in _bands(self._stored[name])]
        return whole(name, self.tensors[name])

    def read(self, rows: Rows) -> Tensor:
        stored, spec = self._stored.get(rows.name), self.tensors[rows.name]
        if stored is None or (rows.name in VOCABULARY and rows.first >= required_vocab(self.cfg)):
            return torch.zeros(rows.count, *spec.shape[1:], dtype=spec.dtype)
        target = torch.empty(rows.count, *spec.shape[1:], dtype=spec.dtype)
        offsets = torch.Size([rows.first] + [0] * (target.ndim - 1))
        items = create_read_items_for_chunk_list(
            MODEL + rows.name, stored, [ChunkStorageMetadata(offsets, target.size())]
        )
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.what}: {rows.name} cannot be read: {error}") from error
        return target

    def culprits(self, rows: Rows) -> list[str]:
        return [rows.name]

    def _unpadded(self) -> dict[str, tuple[int, ...]]:
        return {name: self._unpadded_shape(name, tuple(entry.size)) for name, entry in self._stored.items()}

    def _unpadded_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Padding depends on the layout: only the rows that carry meaning must agree."""
        return (min(required_vocab(self.cfg), shape[0]), *shape[1:]) if name in VOCABULARY else shape


class _Into(DefaultLoadPlanner):
    """Puts what is read for one chunk into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        value = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            value = value.narrow(dim, offset, length)
        return value

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _bands(stored: TensorStorageMetadata) -> list[tuple[int, int]]:
    """Ranges of dimension 0 that no stored chunk straddles: reading band by band touches each chunk once."""
    bands: list[tuple[int, int]] = []
    for first, last in sorted({(c.offsets[0], c.offsets[0] + c.sizes[0]) for c in stored.chunks if min(c.sizes)}):
        if bands and first < bands[-1][1]:
            bands[-1] = (bands[-1][0], max(last, bands[-1][1]))
        else:
            bands.append((first, last))
    return bands


def find_native(folder: Path, step: int | None) -> Path:
    """The checkpoint that `folder` is or contains. Raises CheckpointError."""
    if (folder / MANIFEST).exists() and step is None:
        return folder
    if step is not None:
        found = folders.iteration_folder(folder, step)
        if not found.is_dir():
            present = sorted({iteration for iteration, _ in folders.list_folders(folder)})
            remedy = f"there are {present}: change --ckpt-step" if present else "there are none: drop --ckpt-step"
            raise CheckpointError(f"{folder} has no iteration {step}; {remedy}")
        return found
    candidates = folders.candidates(folder, folders.read_tracker(folder))
    if not candidates:
        below = _folder_below(folder)
        remedy = "--load takes what --save was in training" if below is None else f"{below} does: name that"
        raise CheckpointError(f"{folder} holds no native checkpoint: {remedy}")
    return candidates[0][1]


def _folder_below(folder: Path) -> Path | None:
    """One with checkpoints, as a run's folder has."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(OSError):
                if folders.list_folders(path):
                    return path
    return None


def _verify_manifest(folder: Path, hashes: bool) -> None:
    again = "take an earlier one with --ckpt-step"
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        raise CheckpointError(f"{error}: {again}") from None
    for entry in manifest.files:
        if (problem := check_file(folder, entry, hashes=hashes)) is not None:
            raise CheckpointError(f"{problem}: {again}")
    if problem := incomplete(folder, manifest):
        raise CheckpointError(f"{problem}: {again}")


def read_config(folder: Path, dispatcher: str | None = None) -> Config:
    """Settings of the run that wrote a checkpoint, with the vocabulary that its tensors really have.

    A dispatcher of another package (``module:factory``) is code that the checkpoint names. It takes the place of the plain
    all-to-all only if the user names it as well, as `dispatcher`: nothing is imported because a file says so.
    """
    saved = read_saved_config(folder)
    kind = SwinConfig if "swin" in saved else Config
    cfg: Config = from_dict({"version": 1, "derived": [], "config": saved}, kind)
    _find_tokenizer(cfg, folder, saved.get("data", {}))
    if ":" in cfg.moe.moe_token_dispatcher_type and cfg.moe.moe_token_dispatcher_type != dispatcher:
        cfg.moe.moe_token_dispatcher_type = "alltoall"
    rows = set(read_state(folder).padded_rows.values())
    if len(rows) == 1:
        cfg.model.vocab_size = rows.pop()
    return cfg


def _find_tokenizer(cfg: Config, folder: Path, data: Mapping[str, Any]) -> None:
    """Set the paths of the tokenizer to the checkpoint's own files; those that nobody can follow to None."""
    kept = kept_tokenizer(folder, data)
    for name in TOKENIZER_FILES:
        path = kept.get(name, getattr(cfg.data, name))
        if path is not None and not Path(path).is_absolute() and name not in kept:
            on_the_hub = cfg.data.tokenizer_type == "HuggingFaceTokenizer" and not Path(path).exists()
            if not on_the_hub:
                cfg.notices.append(f"{folder}: data.{name} ({path}) lies in a folder that the checkpoint does not name")
                path = None
        setattr(cfg.data, name, path)


class NativeWriter:
    """Writes a source into a checkpoint folder.

    Tensors keep their type (training reads any into its fp32 parameters). Every piece is a chunk of its own, so no
    stacked tensor is ever whole in memory.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
        self._writer.set_up_storage_writer(is_coordinator=True)
        # DCP writes one file per rank and plan; these plans are of ranks that do not exist, one file after the other.
        plans = [SavePlan([_write_item(source, rows) for rows in file]) for file in _files(source)]
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer.prepare_global_plan(plans)
        self._results: list[Any] = []

    def write(self, read: Callable[[Rows], Tensor]) -> None:
        """Write all tensors; ``read(rows)`` gives each piece, in order. Raises OSError and what `read` raises."""
        for plan in self._plans:
            self._results.append(self._writer.write_data(plan, _FromSource(read)).wait())

    def finish(self) -> None:
        """Write what is not a tensor, and the manifest last. Raises OSError."""
        self._writer.finish(self._metadata, self._results)
        layout = layout_of(offline_context())
        vocab = required_vocab(self._source.cfg)
        state = {
            "progress": {"iteration": 0, "consumed_samples": 0},
            "extra": {"hf_dtypes": {name: str(kind)[6:] for name, kind in self._source.origin.dtypes.items()}},
            "padded_rows": {name: vocab for name in VOCABULARY if name in self._source.tensors},
            "schedule": None,
            "optimizer": None,
            "layout": layout,
        }
        write_json(self._folder / STATE, state)
        # Of a model's shape nothing is derived again: under another --seq-length its tables stay as large as they are.
        write_json(self._folder / CONFIG, {"version": FORMAT_VERSION, "derived": [], "config": self._config()})
        self._copy_small_files()
        write_manifest(self._folder, self._manifest(layout))

    def _config(self) -> dict[str, Any]:
        """Sections that describe the model; the rest is the business of a training run."""
        sections = to_dict(self._source.cfg)["config"]
        kept = {name: sections[name] for name in ("model", *(["moe"] if self._source.cfg.moe.num_experts else []))}
        kept |= {name: sections[name] for name in ("swin", "images") if name in sections}
        data = self._source.cfg.data
        if data.tokenizer_type is not None:  # the source was trained here
            kept["data"] = {name: sections["data"][name] for name in TOKENIZER_SETTINGS}
        elif "tokenizer.json" in self._source.origin.files or "tokenizer.model" in self._source.origin.files:
            place = (self._folder.parent / folders.RELEASE / HF).absolute()
            kept["data"] = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(place)}
        return kept

    def _copy_small_files(self) -> None:
        origin = self._source.origin
        if origin.tokenizer is not None:  # the source was trained here
            (self._folder / KEPT).mkdir()
            for name, content in tokenizer_contents(self._source.cfg.data).items():
                (self._folder / KEPT / name).write_bytes(content)
            sync_folder(self._folder / KEPT)
            return
        if not origin.hf_config:
            return
        (self._folder / HF).mkdir()
        origin.copy_files(self._folder / HF)
        write_json(self._folder / HF / "config.json", origin.hf_config)
        sync_folder(self._folder / HF)

    def _manifest(self, layout: dict[str, Any]) -> Manifest:
        files = []
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and path.name != LOCK:  # which says who writes here, and is gone in the end
                files.append(hash_file(path, self._folder))
        assert any(entry.name == METADATA for entry in files)
        return Manifest(
            iteration=0,
            files=tuple(sorted(files, key=lambda entry: entry.name)),
            layout=layout,
            config_sha256=sha256((self._folder / CONFIG).read_bytes()).hexdigest(),
            torch_version=str(torch.__version__),
            package_version=megatron_lsh.__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            has_optimizer=False,
            has_rng=False,
        )


class _FromSource(DefaultSavePlanner):
    """Hands DCP each piece when it is about to be written."""

    def __init__(self, read: Callable[[Rows], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        data = write_item.tensor_data
        assert data is not None and write_item.index.offset is not None
        name = write_item.index.fqn[len(MODEL) :]
        return self._read(Rows(name, write_item.index.offset[0], data.chunk.sizes[0]))


def _files(source: Source) -> list[list[Rows]]:
    """Pieces in order, cut into files of about _FILE_BYTES."""
    files: list[list[Rows]] = [[]]
    size = 0
    for rows in all_pieces(source):
        spec = source.tensors[rows.name]
        nbytes = spec.nbytes // spec.shape[0] * rows.count
        if files[-1] and size + nbytes > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(rows)
        size += nbytes
    return files


def _write_item(source: Source, rows: Rows) -> WriteItem:
    spec = source.tensors[rows.name]
    offsets = torch.Size([rows.first] + [0] * (len(spec.shape) - 1))
    return WriteItem(
        index=MetadataIndex(MODEL + rows.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size([rows.count, *spec.shape[1:]])),
            properties=TensorProperties(dtype=spec.dtype),
            size=torch.Size(spec.shape),
        ),
    )


def mark_release(root: Path) -> None:
    """Point the tracker file at the converted checkpoint."""
    write_atomically(root / folders.TRACKER, folders.RELEASE.encode())


def refuse_used_folder(root: Path) -> None:
    """Raises CheckpointError if `root` already holds checkpoints."""
    found = [path.name for _, path in folders.list_folders(root)]
    if (root / folders.RELEASE).exists():
        found.append(folders.RELEASE)
    if found:
        raise CheckpointError(f"{root} already holds {', '.join(sorted(found)[:3])}: give another --save, or remove it")
