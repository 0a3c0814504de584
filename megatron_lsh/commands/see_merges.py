"""See what LSH merges: a trained model's clusters in a text, as words, on one HTML page.

    python -m megatron_lsh see_merges --load runs/gpt-moe-lsh/checkpoints --file text.txt --out runs/gpt-moe-lsh/merges.html

One micro-batch of the text, as large as those of the training, goes through the model, whose own dispatcher merges its rows.
The page shows for each layer the largest clusters, what was sent for them, which tokens' restored outputs are farthest from
the exact ones, and which experts see what kind of token. It needs no other file and no network. What it shows also goes to
merges.json beside it: `python -m megatron_lsh report` takes that of a run's folder into its page.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_lsh.commands.generate import add_model_flags, context_length, load, settings_and_tokenizer
from megatron_lsh.commands.perplexity import read_text, tokens_of
from megatron_lsh.config import Config
from megatron_lsh.config.tool_flags import ToolParser, a_path, check_place, integer
from megatron_lsh.data.tokenizers import Tokenizer
from megatron_lsh.data.tokenizers.pieces import pieces
from megatron_lsh.errors import ConfigError
from megatron_lsh.moe.merges import watch_merges
from megatron_lsh.observing.report.merges import FILE, describe, save
from megatron_lsh.observing.report.merges_page import render
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.faults import launch


@dataclass(frozen=True)
class Job:
    """What is to be done, before anything is started. `ids_BS`: the micro-batch."""

    args: argparse.Namespace
    cfg: Config
    tokenizer: Tokenizer
    ids_BS: list[list[int]]
    iteration: int
    exact: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return launch(partial(prepare, arguments), run)


def prepare(arguments: Sequence[str] | None) -> Job:
    """Settings, tokenizer and token ids. Raises ConfigError, CheckpointError, DataError."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, ranks=False)
    parser.add_argument("--file", type=a_path, required=True, help="text in UTF-8")
    parser.add_argument(
        "--out", type=a_path, default=Path("merges.html"), help="where to write the page (default: merges.html)"
    )
    parser.add_argument(
        "--sequences", type=integer(1), help="of the micro-batch (default: the training's --micro-batch-size)"
    )
    parser.add_argument("--lsh-target-rate", help="share of the rows that is sent (default: as in training)")
    args = parser.parse_args(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ConfigError(f"see_merges must run on 1 rank, and was started on {ranks}: start it without torchrun")
    check_place("--out", args.out, args.out.with_name(FILE))
    folder, cfg, tokenizer = settings_and_tokenizer(args)
    if cfg.moe.num_experts is None:
        raise ConfigError(f"--load ({args.load}) must be a model with experts, and has no rows to merge: load another")
    trained = cfg.moe.moe_token_dispatcher_type
    exact = trained in ("alltoall", "allgather")
    if exact or trained == "auto":  # which has nothing to decide on one rank
        cfg.moe.moe_token_dispatcher_type = "lsh"
    _set_rate(cfg, args.lsh_target_rate)
    sequences = cfg.training.micro_batch_size if args.sequences is None else args.sequences
    if sequences is None or sequences < 1:
        raise ConfigError(f"--sequences ({sequences}) must be at least 1: give it")
    ids = tokens_of(args.file, read_text(args.file), tokenizer)
    length = min(context_length(cfg), len(ids))
    sequences = min(sequences, len(ids) // length)
    ids_BS = [ids[length * number : length * (number + 1)] for number in range(sequences)]
    iteration = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else 0
    return Job(args, cfg, tokenizer, ids_BS, iteration, exact)


def _set_rate(cfg: Config, rate: str | None) -> None:
    cfg.lsh.lsh_target_rate = cfg.lsh.lsh_target_rate if rate is None else rate
    try:
        cfg.lsh.rates()
    except ValueError as error:
        raise ConfigError(f"--lsh-target-rate ({cfg.lsh.lsh_target_rate}) {error}: change it") from None


@torch.no_grad()
def run(job: Job) -> None:
    """Load the model, run the text through it, and write the page."""
    args, cfg = job.args, job.cfg
    ctx = initialize(cfg.parallel, moe=True)
    model = load(args, cfg, job.tokenizer, ctx)
    model.set_iteration(job.iteration)
    with watch_merges(model, cfg.lsh.lsh_start_layer) as found:
        model(torch.tensor(job.ids_BS, device=ctx.device))
    if not found:
        name = cfg.moe.moe_token_dispatcher_type
        raise ConfigError(
            f"--load ({args.load}) must merge rows by LSH in some layer, and {name} merges none: load another"
        )
    texts = [pieces(job.tokenizer, ids) for ids in job.ids_BS]
    layers = [describe(merges, texts) for merges in found]
    args.out.write_text(render(layers, f"What LSH merges: {args.file.name}", _notes(job)), encoding="utf-8")
    save(layers, args.out.with_name(FILE))
    for layer in layers:
        print(
            f"layer {layer.layer}: {layer.sent:,} of {layer.rows:,} rows sent | largest cluster: "
            f"{layer.largest[0].size if layer.largest else 1} | residual energy: {layer.missed:.3f} | "
            f"restored error: {layer.error:.4f}"
        )
    print(f"wrote {args.out} and {args.out.with_name(FILE)}", flush=True)
    shutdown(ctx)


def _notes(job: Job) -> list[str]:
    cfg, count = job.cfg, len(job.ids_BS)
    notes = [
        f"{count} sequence{'s' if count > 1 else ''} of {len(job.ids_BS[0]):,} tokens of {job.args.file} through "
        f"{job.args.load}, iteration {job.iteration:,}: each token is a row for each of its {cfg.moe.moe_router_topk} "
        "experts, and rows of one expert that are alike travel as one."
    ]
    if job.exact:
        notes.append("The model was trained with exact dispatch; this is what LSH would merge.")
    if cfg.lsh.lsh_start_layer:
        notes.append(f"Layers before {cfg.lsh.lsh_start_layer} send every row (--lsh-start-layer).")
    return notes
