"""The perplexity of a text file under a native checkpoint, and its bits per byte.

    python -m megatron_lsh perplexity --load runs/gpt-moe-lsh/checkpoints --file README.md
    torchrun --nproc-per-node 4 -m megatron_lsh perplexity --load checkpoints/mixtral --expert-model-parallel-size 4 \\
        --bf16 --file novel.txt --stride 1024

Model and tokenizer are those of the checkpoint's config.json; rows are dispatched exactly, as by an exported model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_lsh.commands.generate import add_model_flags, context_length, load, settings_and_tokenizer
from megatron_lsh.config import Config
from megatron_lsh.config.tool_flags import ToolParser, a_path, integer
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.errors import ConfigError, DataError
from megatron_lsh.inference.perplexity import predict
from megatron_lsh.parallel.agreement import together
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.faults import launch


@dataclass(frozen=True)
class Job:
    """What is to be done, before anything is started."""

    args: argparse.Namespace
    cfg: Config
    tokenizer: Tokenizer
    text: str
    ids: list[int]
    context: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return launch(partial(prepare, arguments), run)


def prepare(arguments: Sequence[str] | None) -> Job:
    """Settings, tokenizer and token ids. Raises ConfigError, CheckpointError, DataError."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--file", type=a_path, required=True, help="text in UTF-8")
    parser.add_argument(
        "--stride", type=integer(1), help="tokens from one window to the next (default: half of the model's length)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line")
    args = parser.parse_args(arguments)
    _, cfg, tokenizer = settings_and_tokenizer(args)
    context = context_length(cfg)
    args.stride = max(context // 2, 1) if args.stride is None else args.stride
    if args.stride > context:
        raise ConfigError(
            f"--stride ({args.stride}) must be at least 1 and at most the model's length ({context}): change it"
        )
    text = read_text(args.file)
    return Job(args, cfg, tokenizer, text, tokens_of(args.file, text, tokenizer), context)


def read_text(file: Path) -> str:
    """What --file names. Raises DataError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file ({file}) must be a text in UTF-8 that can be read: {error}") from error


def tokens_of(file: Path, text: str, tokenizer: Tokenizer) -> list[int]:
    """Raises DataError for a text that is too short."""
    ids = tokenizer.tokenize(text)
    if len(ids) < 2:
        raise DataError(f"--file ({file}) must have at least 2 tokens, and has {len(ids)}: give a longer text")
    return ids


def run(job: Job) -> None:
    """Load the model, predict, and print on rank 0. Collective."""
    ctx = initialize(job.cfg.parallel, moe=job.cfg.moe.num_experts is not None)
    model = together(ctx, lambda: load(job.args, job.cfg, job.tokenizer, ctx))
    found = predict(model, job.ids, job.context, job.args.stride)
    if ctx.rank == 0:
        bits = found.bits_per_byte(len(job.text.encode()))
        facts = {"tokens": found.tokens, "loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": bits}
        line = (
            f"{job.args.file}: {found.tokens:,} tokens predicted | loss: {found.loss:.6f} | "
            f"perplexity: {found.perplexity:.4f} | bits per byte: {bits:.4f}"
        )
        print(json.dumps(facts) if job.args.json else line, flush=True)
    shutdown(ctx)
