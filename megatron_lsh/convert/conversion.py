"""From a source to a folder in any format: written under another name, verified, then given its name."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lsh.checkpoint import folders
from megatron_lsh.convert.hf import HuggingFaceSource, HuggingFaceWriter, small_files
from megatron_lsh.convert.logits import Agreement, compare_logits, why_not_compared
from megatron_lsh.convert.megatron import LOCAL, MegatronSource, MegatronWriter
from megatron_lsh.convert.native import NativeSource, NativeWriter, mark_release, refuse_used_folder
from megatron_lsh.convert.output import new_folder
from megatron_lsh.convert.progress import ByteProgress
from megatron_lsh.convert.source import Origin, Rows, Source, TensorSpec, required_vocab, total_bytes
from megatron_lsh.convert.tokenizer import compare_ids
from megatron_lsh.convert.verify import Recorder, verify_copy
from megatron_lsh.errors import CheckpointError


class _Writer(Protocol):
    def write(self, read: Callable[[Rows], Tensor]) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Checks:
    """What is done to make sure of a conversion, and who hears of it.

    Attributes:
        verify: read the result back and compare every tensor's checksum.
        logits: with `verify`, also compare the logits of both models, where transformers and the memory for it are there.
        logits_with: the Hugging Face folder that a source came from, to compare a converted model with.
        say: takes one line of text for the user.
        progress: show a progress line.
    """

    verify: bool = True
    logits: bool = True
    logits_with: Path | None = None
    say: Callable[[str], None] = print
    progress: bool = False


def save_hf(
    source: Source,
    folder: str | Path,
    *,
    model_type: str | None = None,
    max_shard: int = 5 * 10**9,
    checks: Checks | None = None,
) -> None:
    """Write `source` as a Hugging Face folder in the hub layout. Raises CheckpointError; then nothing is left behind."""
    folder, checks = Path(folder), checks or Checks()
    with new_folder(folder, total_bytes(source)) as partial:
        writer = HuggingFaceWriter(source, partial, model_type, max_shard)
        digests = _stream(source, writer, checks)
        if checks.verify:
            _verify(digests, HuggingFaceSource(partial), checks)
            if source.origin.tokenizer is not None:
                checks.say(compare_ids(source.origin.tokenizer, partial))
            if checks.logits:
                _compare(source, partial, checks)


def save_native(source: Source, folder: str | Path, *, checks: Checks | None = None) -> None:
    """Write `source` as the native checkpoint ``FOLDER/release``. Raises CheckpointError; then nothing is left behind."""
    folder, checks = Path(folder), checks or Checks()
    refuse_used_folder(folder)
    with new_folder(folder / folders.RELEASE, total_bytes(source)) as partial:
        digests = _stream(source, NativeWriter(source, partial), checks)
        if checks.verify:
            written = NativeSource(partial)
            _verify(digests, written, checks)
            if checks.logits and checks.logits_with is not None:
                _compare(written, checks.logits_with, checks)
    mark_release(folder)


def save_megatron(
    source: Source, folder: str | Path, *, tp: int = 1, ep: int = 1, spelling: str = LOCAL, checks: Checks | None = None
) -> None:
    """Write `source` as the legacy checkpoint ``FOLDER/release``. Raises CheckpointError; then nothing is left behind."""
    folder, checks = Path(folder), checks or Checks()
    refuse_used_folder(folder)
    with new_folder(folder / folders.RELEASE, total_bytes(source)) as partial:
        digests = _stream(source, MegatronWriter(source, partial, tp, ep, spelling), checks)
        if checks.verify:
            written = MegatronSource(partial, vocab_size=required_vocab(source.cfg))
            _verify(digests, written, checks)
            if checks.logits and checks.logits_with is not None:
                _compare(written, checks.logits_with, checks)
    mark_release(folder)


def _stream(source: Source, writer: _Writer, checks: Checks) -> dict[str, str]:
    progress = ByteProgress("converting", total_bytes(source), sys.stderr) if checks.progress else None
    recorder = Recorder(source, progress)
    writer.write(recorder.read)
    writer.finish()
    if progress is not None:
        progress.finish()
    return recorder.digests


def _verify(digests: dict[str, str], written: Source, checks: Checks) -> None:
    progress = ByteProgress("verifying ", total_bytes(written), sys.stderr) if checks.progress else None
    count = verify_copy(digests, written, progress)
    if progress is not None:
        progress.finish()
    checks.say(f"verified: {count} tensors, {total_bytes(written) / 1e9:.3f} GB, shapes and SHA-256 equal")


def _compare(source: Source, hf_folder: Path, checks: Checks) -> Agreement | None:
    reason = why_not_compared(source)
    if reason is not None:
        checks.say(f"logits not compared: {reason}")
        return None
    found = compare_logits(source, hf_folder)
    checks.say(f"verified: the model here and in transformers agree, {found}")
    return found


class CastSource:
    """A source with all floating-point tensors in one type."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.what, self.cfg = source.what, source.cfg
        self.tensors = {name: TensorSpec(spec.shape, dtype) for name, spec in source.tensors.items()}
        self.origin = replace(source.origin, dtypes={})
        self._source, self._dtype = source, dtype

    def pieces(self, name: str) -> list[Rows]:
        return self._source.pieces(name)

    def read(self, rows: Rows) -> Tensor:
        return self._source.read(rows).to(self._dtype)

    def culprits(self, rows: Rows) -> list[str]:
        return self._source.culprits(rows) or [f"{rows.name} in {self._dtype}"]


def with_reference(source: Source, folder: str | Path) -> Source:
    """The source with the tokenizer, generation_config.json and config.json of another Hugging Face folder to go with it."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--reference {folder} has no readable config.json ({error}): give a model's folder"
        ) from None
    result: Any = copy.copy(source)
    result.origin = Origin(config, small_files(folder), source.origin.dtypes)
    return result  # type: ignore[no-any-return]
