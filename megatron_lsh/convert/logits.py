"""Do both models say the same? Logits of ours and of transformers' on the same random prompts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lsh.convert.source import Source, all_pieces, plain, required_vocab
from megatron_lsh.errors import CheckpointError
from megatron_lsh.inference.load import build_model
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.parallel.context import offline_context

TOLERANCE = 1e-3  # of the logits' standard deviation; a wrong mapping gives differences of its own size
_ROWS, _LENGTH = 2, 32


@dataclass(frozen=True)
class Agreement:
    """Largest difference of any logit, and the logits' standard deviation."""

    difference: float
    scale: float

    def __str__(self) -> str:
        return f"largest difference of logits {self.difference:.1e} (their standard deviation is {self.scale:.2g})"


def why_not_compared(source: Source, margin: float = 1.3) -> str | None:
    """What prevents a comparison: no transformers, or too little memory for both models in fp32. None if nothing does."""
    if importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed"
    need = margin * 8 * sum(spec.nbytes // spec.dtype.itemsize for spec in source.tensors.values())
    free = available_memory()
    if free is None or need > free:
        return f"both models in fp32 need {need / 1e9:.1f} GB of memory, of which {(free or 0) / 1e9:.1f} GB are free"
    return None


def available_memory() -> int | None:
    """Bytes that a program can still use; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def compare_logits(source: Source, hf_folder: Path, seed: int = 1234) -> Agreement:
    """Run both models in fp32 on the CPU.

    Raises CheckpointError: transformers cannot load the folder or finds tensors missing, or the logits differ by more than
    TOLERANCE of their standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(_LENGTH, source.cfg.model.max_position_embeddings or _LENGTH)
    tokens_BS = torch.randint(required_vocab(source.cfg), (_ROWS, length), generator=generator)
    theirs = _their_logits(hf_folder, tokens_BS)
    ours = our_logits(source, tokens_BS)
    found = Agreement(float((ours - theirs).abs().max()), float(theirs.std()))
    if not found.difference <= TOLERANCE * found.scale:
        raise CheckpointError(f"{source.what} and {hf_folder} are different models: {found}: report this as a bug")
    return found


@torch.no_grad()
def our_logits(source: Source, tokens_BS: Tensor) -> Tensor:
    """fp32 logits [B, S, V] without padding."""
    logits = load_model(source)(tokens_BS)
    assert isinstance(logits, Tensor)
    return logits[..., : required_vocab(source.cfg)]


@torch.no_grad()
def load_model(source: Source) -> GPTModel:
    """The model in fp32 on the CPU, in evaluation mode."""
    model = build_model(plain(source.cfg), offline_context(device="cpu"))
    state = model.state_dict()
    for rows in all_pieces(source):
        state[rows.name][rows.first : rows.first + rows.count] = source.read(rows)
    return model


@torch.no_grad()
def _their_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    import transformers

    dtype = "torch_dtype" if int(transformers.__version__.split(".")[0]) < 5 else "dtype"
    with _quiet():
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **{dtype: torch.float32}
            )
        except Exception as error:  # transformers raises anything
            raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    model, info = loaded
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise CheckpointError(f"transformers finds no {absent[0]} in {folder} (and {len(absent) - 1} more like it)")
    logits: Tensor = model.eval()(tokens_BS).logits
    return logits.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice from transformers."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.ERROR)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
