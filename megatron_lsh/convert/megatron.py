"""Megatron-LM's legacy checkpoints: ``iter_N/mp_rank_TT[_EEE]/model_optim_rng.pt``, one file per (TP, EP) rank.

megatron_table.py has the names, megatron_args.py the settings.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.checkpoint import folders
from megatron_lsh.checkpoint.compare import started_at_zero, zero_if_absent
from megatron_lsh.config import padded_vocab_size
from megatron_lsh.convert.hf import vocabulary_pieces
from megatron_lsh.convert.megatron_args import args_of, config_of
from megatron_lsh.convert.megatron_table import (
    GATED,
    IGNORED,
    WHOLE,
    Row,
    cut_for,
    cut_shape,
    find_row,
    join,
    spellings,
)
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
from megatron_lsh.convert.torch_file import StoredTensor, TorchFileWriter, open_torch_file
from megatron_lsh.errors import CheckpointError, ConfigError

FILE = "model_optim_rng.pt"
_GROUPED = (".mlp.experts.weight1", ".mlp.experts.weight2")
LOCAL, TE = "local", "te"


class MegatronSource:
    """A legacy checkpoint, unpickled by torch's weights-only loader.

    Args:
        folder: what --save was, or one ``iter_N`` in it.
        step: the iteration, by default what the tracker file says.
        vocab_size: tokens before padding; by default those of the args, which may not tell, or all rows of the embedding.
        ignored: settings of args, unknown here, of which the user knows that they change nothing.

    Raises CheckpointError: a missing or damaged file, a setting that is not supported, a tensor that is missing, left over
    or of a wrong shape.
    """

    def __init__(
        self,
        folder: str | Path,
        step: int | None = None,
        vocab_size: int | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        folder = find_legacy(Path(folder), step)
        self.what = str(folder)
        files = {
            _coordinates(path.parent.name): open_torch_file(path) for path in sorted(folder.glob(f"mp_rank_*/{FILE}"))
        }
        if not files:
            raise CheckpointError(
                f"{folder} has no mp_rank_*/{FILE}: --from megatron reads the legacy format (--ckpt-format torch)"
            )
        args = next(iter(files.values())).get("args")
        if not isinstance(args, argparse.Namespace):
            raise CheckpointError(f"{folder} has no args in it: save it again with Megatron-LM")
        self.cfg, self.notices = config_of(args, self.what, ignored)
        self._ranks = _Ranks(args, files, self.what)
        self.cfg.model.vocab_size = self._vocab(vocab_size, getattr(args, "vocab_size", None))
        self._stored: dict[str, list[list[StoredTensor]]] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self._account()
        self.origin = Origin()

    def pieces(self, name: str) -> list[Rows]:
        spec = self.tensors[name]
        if name in VOCABULARY:
            return vocabulary_pieces(name, spec, required_vocab(self.cfg))
        return row_by_row(name, spec) if ".experts." in name else whole(name, spec)

    def read(self, rows: Rows) -> Tensor:
        spec = self.tensors[rows.name]
        row, _ = find_row(rows.name)
        vocab = required_vocab(self.cfg)
        if rows.name not in self._stored or (rows.name in VOCABULARY and rows.first >= vocab):
            return torch.zeros(rows.count, *spec.shape[1:], dtype=spec.dtype)
        gated = row.cut == GATED and self.cfg.model.swiglu
        if row.local is not None:
            experts = [self._stored[rows.name][rows.first + number] for number in range(rows.count)]
            values = [join([part.read() for part in parts], row.cut, gated) for parts in experts]
            return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)
        value = join([part.read() for part in self._stored[rows.name][0]], row.cut, gated)
        if rows.name in VOCABULARY:
            return value[rows.first : rows.first + rows.count]
        return value.view(spec.shape)

    def culprits(self, rows: Rows) -> list[str]:
        row, layer = find_row(rows.name)
        if row.local is None:
            return [rows.name]
        rank, number = divmod(rows.first, self.tensors[rows.name].shape[0] // self._ranks.ep)
        return [f"{spellings(row, layer, number)[0]} of expert-parallel rank {rank}"]

    def _vocab(self, vocab_size: int | None, of_args: Any) -> int:
        parts = self._ranks.dense("embedding.word_embeddings.weight")
        rows = sum(part.spec.shape[0] for part in parts)
        if not rows:
            raise CheckpointError(
                f"{self.what}: embedding.word_embeddings.weight is missing or empty: files are missing or not of a GPT"
            )
        if vocab_size is not None and not 1 <= vocab_size <= rows:
            raise CheckpointError(
                f"--vocab-size ({vocab_size}) must be from 1 to {rows}, the rows of the embedding: correct it"
            )
        told = of_args if type(of_args) is int and 1 <= of_args <= rows else rows
        return vocab_size or told

    def _account(self) -> None:
        problems: list[str] = []
        try:
            shapes = model_shapes(self.cfg)
        except ConfigError as error:
            raise CheckpointError(f"args in {self.what}: no model can have these settings: {error}") from None
        zero = zero_if_absent(self._ranks.names(), shapes)  # megatron-core before 0.15 has no router bias
        if zero:
            self.notices.append(f"{self.what}: {started_at_zero(zero)}")
        for native, shape in shapes.items():
            row, layer = find_row(native)
            if native in zero:
                self.tensors[native] = TensorSpec(shape, torch.float32)
                continue
            copies = shape[0] if row.local is not None else 1
            stored = [self._ranks.find(row, layer, expert, copies) for expert in range(copies)]
            if not all(stored):
                expert = next(number for number, parts in enumerate(stored) if not parts)
                problems.append(f"{' or '.join(spellings(row, layer, expert))} is missing")
                continue
            self._stored[native] = stored
            first = stored[0][0].spec
            self.tensors[native] = TensorSpec(shape, first.dtype)
            one = shape[1:] if row.local is not None else shape
            expected = cut_shape(one, native, row.cut, row.cut == GATED and self.cfg.model.swiglu, len(stored[0]))
            for expert, parts in enumerate(stored):
                for part in parts:
                    wrong = part.spec.dtype != first.dtype or not _fits(part.spec.shape, expected, native)
                    if wrong:
                        name = spellings(row, layer, expert)[0]
                        problems.append(f"{name} is {part.spec} and should have shape {list(expected)}, {first.dtype}")
        problems += [f"{name} is left over" for name in self._ranks.unused() if not IGNORED.fullmatch(name)]
        if any(name.endswith(_GROUPED) for name in self._ranks.names()):
            raise CheckpointError(
                f"{self.what}: its experts are in GroupedMLP's weight1 and weight2, which are not read here: save it again "
                "with Megatron-LM without --moe-use-legacy-grouped-gemm, or without --moe-grouped-gemm"
            )
        absent = any(problem.endswith(" is missing") for problem in problems)
        complete = (
            "the model is another than the args in the checkpoint say, or of a kind that this version does not know"
        )
        fail(
            self.what, problems, "the files are incomplete or of another model; copy them again" if absent else complete
        )


def _fits(found: tuple[int, ...], expected: tuple[int, ...], native: str) -> bool:
    return found == expected or (native in VOCABULARY and found[1:] == expected[1:])  # rows depend on the padding


class _Ranks:
    """The files of all ranks, and which of their tensors were asked for."""

    def __init__(self, args: argparse.Namespace, files: Mapping[tuple[int, int], dict[str, Any]], what: str) -> None:
        self.tp = int(getattr(args, "tensor_model_parallel_size", 1) or 1)
        self.ep = int(getattr(args, "expert_model_parallel_size", 1) or 1)
        self.etp = int(getattr(args, "expert_tensor_parallel_size", None) or self.tp)
        self._models: dict[tuple[int, int], dict[str, Any]] = {}
        for place, content in files.items():
            if not isinstance(content.get("model"), dict):
                raise CheckpointError(f"{what}: the file of rank {place} has no model in it: copy it again")
            self._models[place] = _without_wrappers(content["model"])
        self._used: set[str] = set()
        missing = [f"tensor-parallel rank {tp}" for tp in range(self.tp) if not any(p[0] == tp for p in files)]
        missing += [f"expert-parallel rank {ep}" for ep in range(self.ep) if not any(p[1] == ep for p in files)]
        fail(what, [f"the file of {rank} is missing" for rank in missing], "copy all mp_rank_* folders")

    def dense(self, name: str) -> list[StoredTensor]:
        """The shards of a tensor, by tensor-parallel rank; empty if one is missing."""
        return self._collect(name, [[place for place in self._models if place[0] == tp] for tp in range(self.tp)])

    def expert(self, name: str, ep: int) -> list[StoredTensor]:
        """The shards of a tensor of an expert on rank `ep`, which ETP ranks of each tensor-parallel group share."""
        ranks = [
            [place for place in self._models if place[1] == ep and place[0] % self.etp == r] for r in range(self.etp)
        ]
        return self._collect(name, ranks)

    def find(self, row: Row, layer: int, expert: int, num_experts: int) -> list[StoredTensor]:
        """The shards of a tensor in whichever spelling it is there; empty if in none."""
        if row.local is None:
            found = (self.dense(name) for name in spellings(row, layer, 0))
        else:
            per_rank = num_experts // self.ep
            found = (self.expert(name, expert // per_rank) for name in spellings(row, layer, expert % per_rank))
        shards = next((parts for parts in found if parts), [])
        return shards[:1] if row.cut == WHOLE else shards

    def names(self) -> set[str]:
        """Of the tensors in all files."""
        return {name for model in self._models.values() for name in model}

    def unused(self) -> list[str]:
        return sorted(self.names() - self._used)

    def _collect(self, name: str, ranks: list[list[tuple[int, int]]]) -> list[StoredTensor]:
        """One shard per entry of `ranks`, which lists the files that hold it alike."""
        parts = []
        for places in ranks:
            stored = self._models[places[0]].get(name) if places else None
            if not isinstance(stored, StoredTensor):
                return []
            parts.append(stored)
        self._used.add(name)
        return parts


def _without_wrappers(model: dict[str, Any]) -> dict[str, Any]:
    """With the names that the tensors have inside of DDP and Float16Module, each of which puts ``module.`` in front."""
    while model and all(str(name).startswith("module.") for name in model):
        model = {str(name).removeprefix("module."): value for name, value in model.items()}
    return model


def _coordinates(name: str) -> tuple[int, int]:
    """(TP, EP) rank of a folder ``mp_rank_TT[_EEE]``."""
    match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", name)
    if match is None:
        raise CheckpointError(
            f"{name} is a checkpoint with pipeline stages: save it again with --pipeline-model-parallel-size 1"
        )
    return int(match[1]), int(match[2] or 0)


def find_legacy(folder: Path, step: int | None) -> Path:
    """The checkpoint that `folder` is or contains. Raises CheckpointError."""
    if step is None and any(folder.glob("mp_rank_*")):
        return folder
    tracker = folders.read_tracker(folder)
    if step is None and (tracker is None or tracker.problem is not None):
        raise CheckpointError(f"{folder} has neither mp_rank_* folders nor a valid {folders.TRACKER}: give --ckpt-step")
    iteration = step if step is not None else tracker.iteration if tracker is not None else None
    found = folder / folders.RELEASE if iteration is None else folders.iteration_folder(folder, iteration)
    if not found.is_dir():
        raise CheckpointError(f"{found} is not there: change --ckpt-step")
    return found


class MegatronWriter:
    """Writes a source as a legacy checkpoint. `write` takes pieces in any order.

    Args:
        tp, ep: layout of the checkpoint; experts are cut over the tensor-parallel ranks too, Megatron-LM's default.
        spelling: ``local`` (SequentialMLP) or ``te`` (TransformerEngine, grouped).

    Raises CheckpointError for a model that Megatron-LM does not have, or that cannot be cut so.
    """

    def __init__(self, source: Source, folder: Path, tp: int = 1, ep: int = 1, spelling: str = LOCAL) -> None:
        self._source, self._folder, self._tp, self._ep, self._te = source, folder, tp, ep, spelling == TE
        cfg = source.cfg
        if cfg.model.qk_layernorm and cfg.model.qk_layernorm_width != "head":
            raise CheckpointError("--qk-layernorm-width full has no place in a Megatron-LM checkpoint: export to hf")
        if cfg.moe.moe_latent_size is not None:
            raise CheckpointError("--moe-latent-size: latent experts have no place in the legacy layout")
        if cfg.model.apply_residual_connection_post_layernorm:
            raise CheckpointError("--apply-residual-connection-post-layernorm has no place in a Megatron-LM checkpoint")
        for kind, size in (("tensor", tp), ("expert", ep)):
            if size < 1:
                raise CheckpointError(f"--target-{kind}-parallel-size ({size}) must be at least 1: change it")
        experts = cfg.moe.num_experts or 0
        if experts % ep or (not experts and ep > 1):
            raise CheckpointError(
                f"{experts} experts cannot be spread over {ep} ranks: change --target-expert-parallel-size"
            )
        if cfg.model.num_query_groups % tp:
            raise CheckpointError(
                f"{cfg.model.num_query_groups} query groups cannot be cut over {tp} ranks: "
                "change --target-tensor-parallel-size"
            )
        self._rows = padded_vocab_size(required_vocab(cfg), cfg.model.make_vocab_size_divisible_by, tp)
        self._layouts = {place: self._file(*place) for place in [(t, e) for t in range(tp) for e in range(ep)]}

    def write(self, read: Callable[[Rows], Tensor]) -> None:
        """Raises OSError and what `read` raises."""
        content = {
            "args": args_of(self._source.cfg, self._tp, self._ep, self._rows, te=self._te),
            "checkpoint_version": 3.0,
            "iteration": 0,
        }
        files: dict[tuple[int, int], TorchFileWriter] = {}
        try:
            for place, layout in self._layouts.items():
                name = f"mp_rank_{place[0]:02d}" + (f"_{place[1]:03d}" if self._ep > 1 else "")
                (self._folder / name).mkdir()
                files[place] = TorchFileWriter(self._folder / name / FILE, content, layout)
            for rows in all_pieces(self._source):
                self._spread(rows, read(rows), files)
        finally:
            for file in files.values():
                file.close()

    def finish(self) -> None:
        """Nothing is left to write."""

    def _spread(self, rows: Rows, value: Tensor, files: Mapping[tuple[int, int], TorchFileWriter]) -> None:
        """Write one piece into the files of the ranks that hold it."""
        row, _ = find_row(rows.name)
        gated = row.cut == GATED and self._source.cfg.model.swiglu
        for (tp, ep), file in files.items():
            if rows.name in VOCABULARY:
                share = self._rows // self._tp
                first, last = max(rows.first, tp * share), min(rows.first + rows.count, (tp + 1) * share)
                if first < last:  # what padding remains is zeros already
                    share_of_it = value[first - rows.first : last - rows.first]
                    file.write(self._name(rows.name, 0), share_of_it, first - tp * share)
            elif row.local is not None:
                per_rank = self._source.tensors[rows.name].shape[0] // self._ep
                for expert, part in enumerate(value, rows.first):
                    if expert // per_rank == ep:
                        shard = cut_for(part, row.cut, gated, tp, self._tp)
                        file.write(self._name(rows.name, expert % per_rank), shard)
            else:
                flat = value.flatten(0, 1) if gated else value
                file.write(self._name(rows.name, 0), cut_for(flat, row.cut, gated, tp, self._tp))

    def _file(self, tp: int, ep: int) -> dict[str, TensorSpec]:
        """Tensors of one rank."""
        layout: dict[str, TensorSpec] = {}
        for native, spec in self._source.tensors.items():
            row, _ = find_row(native)
            shape, copies = spec.shape, 1
            if native in VOCABULARY:
                shape = (self._rows, *shape[1:])
            elif row.local is not None:
                shape, copies = shape[1:], shape[0] // self._ep
            gated = row.cut == GATED and self._source.cfg.model.swiglu
            shard = TensorSpec(cut_shape(shape, native, row.cut, gated, self._tp), spec.dtype)
            layout |= {self._name(native, expert): shard for expert in range(copies)}
        return layout

    def _name(self, native: str, expert: int) -> str:
        row, layer = find_row(native)
        names = spellings(row, layer, expert)
        dense = f"decoder.layers.{layer}.mlp.linear_fc1.weight" in self._source.tensors
        # TransformerEngine fuses norms with the linear layer behind them, and behind this one there may be a router.
        fused = self._te and (dense or "pre_mlp_layernorm" not in native)
        return names[-1] if fused else names[0]
