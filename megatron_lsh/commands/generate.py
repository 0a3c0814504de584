"""Let a native checkpoint continue texts, token by token as they are drawn.

    python -m megatron_lsh generate --load runs/gpt-moe-lsh/checkpoints --prompt "import numpy" "def main("
    torchrun --nproc-per-node 4 -m megatron_lsh generate --load checkpoints/mixtral --expert-model-parallel-size 4 --bf16 \\
        --prompt "The capital of France is" --temperature 0

Model and tokenizer are those of the checkpoint's config.json. Runs on a GPU if there is one, on any number of ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_lsh.config import Config
from megatron_lsh.config.tool_flags import ToolParser, a_name, a_path, a_text, integer, real
from megatron_lsh.convert.files import read_json
from megatron_lsh.convert.native import HF, find_native, read_config
from megatron_lsh.convert.source import VOCABULARY
from megatron_lsh.data.samples.prompts import prompt_ids, read_prompts
from megatron_lsh.data.tokenizers import Tokenizer, build_tokenizer
from megatron_lsh.errors import ConfigError
from megatron_lsh.inference.generate import Sampling, generate_batch
from megatron_lsh.inference.load import load_model
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.parallel.agreement import together
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.faults import launch


@dataclass(frozen=True)
class Job:
    """What is to be done, before anything is started."""

    args: argparse.Namespace
    folder: Path
    cfg: Config
    tokenizer: Tokenizer
    prompts: list[list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    return launch(partial(prepare, arguments), run)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_flags(parser)
    add("--prompt", nargs="+", type=a_text, default=[], help="texts to continue, all at once")
    add("--prompt-file", type=a_path, help="further texts, one per line")
    add("--max-new-tokens", type=integer(1), default=100, help="tokens to add at most (default: 100)")
    add("--temperature", type=real(at_least=0), default=0.8, help="0 takes the most probable token (default: 0.8)")
    add("--top-k", type=integer(0), default=40, help="draw among the k most probable tokens, 0: all (default: 40)")
    add(
        "--top-p",
        type=real(above=0, at_most=1),
        default=1.0,
        help="draw among the most probable with this probability (default: 1)",
    )
    add("--seed", type=integer(), default=1234, help="the same seed draws the same text (default: 1234)")
    return parser.parse_args(arguments)


def add_model_flags(parser: argparse.ArgumentParser, ranks: bool = True) -> None:
    """Which checkpoint, and how it is run; over several ranks where that is possible."""
    add = parser.add_argument
    add("--load", type=a_path, required=True, help="save folder of a run or a conversion, or one checkpoint in it")
    add("--ckpt-step", type=integer(0), help="iteration to load (default: what the tracker file says)")
    add("--tokenizer-type", type=a_name, help="as in training (default: the checkpoint's)")
    add("--tokenizer-model", type=a_name, help="as in training (default: the checkpoint's)")
    if ranks:
        add(
            "--tensor-model-parallel-size",
            type=integer(1),
            default=1,
            help="ranks that share a dense layer (default: 1)",
        )
        add(
            "--expert-model-parallel-size", type=integer(1), default=1, help="ranks that share the experts (default: 1)"
        )
    else:
        parser.set_defaults(tensor_model_parallel_size=1, expert_model_parallel_size=1)
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run (default: a GPU if there is one)",
    )
    add(
        "--moe-token-dispatcher-type",
        type=a_name,
        help="a module:factory that the checkpoint names is imported only if named here",
    )
    add("--bf16", action=argparse.BooleanOptionalAction, help="compute in bf16 (default: as it was trained)")


def prepare(arguments: Sequence[str] | None) -> Job:
    """Settings, tokenizer and token ids. Raises ConfigError, CheckpointError, DataError."""
    args = parse(arguments)
    folder, cfg, tokenizer = settings_and_tokenizer(args)
    prompts = [prompt_ids(tokenizer, text) for text in read_prompts(args.prompt, args.prompt_file)]
    return Job(args, folder, cfg, tokenizer, prompts)


def settings_and_tokenizer(args: argparse.Namespace) -> tuple[Path, Config, Tokenizer]:
    """The checkpoint, its settings for this run, and its tokenizer. Raises ConfigError, CheckpointError, DataError."""
    folder = find_native(args.load, args.ckpt_step)
    cfg = read_config(folder, args.moe_token_dispatcher_type)
    parallel = cfg.parallel
    parallel.tensor_model_parallel_size = args.tensor_model_parallel_size
    parallel.expert_model_parallel_size = args.expert_model_parallel_size
    parallel.expert_tensor_parallel_size = parallel.pipeline_model_parallel_size = parallel.context_parallel_size = 1
    parallel.device, parallel.distributed_backend, parallel.use_distributed_optimizer = args.device, "auto", False
    parallel.moe_node_size = None
    data, numbers = _tokenizer_settings(args, cfg, folder).data, None
    if data.tokenizer_type in (None, "NullTokenizer") and cfg.model.vocab_size:
        numbers = cfg.model.vocab_size - 1 - data.vocab_extra_ids  # the model's has the end of a document and sentinels
    tokenizer = build_tokenizer(data, numbers)
    vocab = cfg.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab}: give --tokenizer-model"
        )
    return folder, cfg, tokenizer


def _tokenizer_settings(args: argparse.Namespace, cfg: Config, folder: Path) -> Config:
    if args.tokenizer_type is not None or args.tokenizer_model is not None:
        cfg.data.tokenizer_type = args.tokenizer_type or cfg.data.tokenizer_type or "HuggingFaceTokenizer"
        cfg.data.tokenizer_model = args.tokenizer_model
    if cfg.data.tokenizer_type is None and not cfg.data.mock_data:
        raise ConfigError(f"{folder} does not know its tokenizer: give --tokenizer-type and --tokenizer-model")
    return cfg


def run(job: Job) -> None:
    """Load the model and write texts to stdout as they grow. Collective."""
    args = job.args
    ctx = initialize(job.cfg.parallel, moe=job.cfg.moe.num_experts is not None)
    model = together(ctx, lambda: load(args, job.cfg, job.tokenizer, ctx))
    printer = Printer(job.tokenizer, job.prompts) if ctx.rank == 0 else None
    generate_batch(
        model,
        job.prompts,
        ctx,
        vocab_size=job.tokenizer.vocab_size,
        context_length=context_length(job.cfg),
        eod=end_tokens(job.folder, job.tokenizer),
        sampling=Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed),
        on_token=None if printer is None else printer.token,
    )
    if printer is not None:
        printer.finish()
    shutdown(ctx)


def context_length(cfg: Config) -> int:
    """Positions that the model has: those of its table, else those that it was trained with, where that is known."""
    return cfg.model.max_position_embeddings or cfg.model.seq_length or 1024


def end_tokens(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Every token that ends a text: the tokenizer's, and those that the files of a converted model name.

    Raises CheckpointError for a damaged file.
    """
    ends = {tokenizer.eod}
    for path in (folder / HF / "config.json", folder / HF / "generation_config.json"):
        named = read_json(path).get("eos_token_id") if path.is_file() else None
        ends |= {token for token in (named if isinstance(named, list) else [named]) if type(token) is int}
    return ends


def load(args: argparse.Namespace, cfg: Config, tokenizer: Tokenizer, ctx: ParallelContext) -> GPTModel:
    """The model in the precision that was asked for, else that of the training. Collective."""
    cfg.model.vocab_size = cfg.model.vocab_size or tokenizer.vocab_size
    model = load_model(cfg, args.load, args.ckpt_step, ctx, VOCABULARY)
    if args.bf16 or (args.bf16 is None and cfg.precision.bf16):
        model.to(torch.bfloat16)
    return model


class Printer:
    """Prints one text at a time, live: the first that has not ended. What the others say is kept until it is their turn."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[list[int]]) -> None:
        self._tokenizer = tokenizer
        self._rows = [list(prompt) for prompt in prompts]
        self._ended = [False] * len(prompts)
        self._current, self._shown = 0, ""
        self._update()

    def token(self, place: int, token: int | None) -> None:
        """One more token of a text, or None at its end."""
        if token is None:
            self._ended[place] = True
        else:
            self._rows[place].append(token)
        if place == self._current:
            self._update()

    def finish(self) -> None:
        """All texts have ended."""
        self._ended = [True] * len(self._ended)
        self._update()

    def _update(self) -> None:
        while self._current < len(self._rows):
            ended = self._ended[self._current]
            text = self._tokenizer.detokenize(self._rows[self._current])
            if not ended:
                text = text.rstrip("\ufffd")  # half of a character: the rest is in the next token
            if len(text) > len(self._shown):
                print(text[len(self._shown) :], end="", flush=True)
                self._shown = text
            if not ended:
                return
            self._current, self._shown = self._current + 1, ""
            print("\n" if self._current < len(self._rows) else "", flush=True)
