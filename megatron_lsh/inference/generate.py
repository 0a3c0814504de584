"""Text from the model: sampling with a key/value cache, for the sample at the end of a run and for tools/generate.py.

Legend: B prompts, S tokens of one forward pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lsh.models.cache import KVCache
from megatron_lsh.moe.schedule import exact_dispatch
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.data_parallel import reshard

_CHUNK = 256  # tokens of a prompt that go through the model at once: bounds the memory of activations and logits


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    """0 takes the most probable token"""
    top_k: int = 40
    """draw among this many most probable tokens; 0: all"""
    top_p: float = 1.0
    """draw among the fewest most probable tokens that together have this probability (Holtzman et al., arXiv:1904.09751)"""
    seed: int = 1234


def generate(
    model: nn.Module,
    prompt: list[int],
    ctx: ParallelContext,
    *,
    vocab_size: int,
    context_length: int,
    eod: int | Collection[int] | None = None,
    sampling: Sampling | None = None,
) -> list[int]:
    """Continue one `prompt`; arguments as in ``generate_batch``."""
    return generate_batch(
        model, [prompt], ctx, vocab_size=vocab_size, context_length=context_length, eod=eod, sampling=sampling
    )[0]


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    prompts: Sequence[list[int]],
    ctx: ParallelContext,
    *,
    vocab_size: int,
    context_length: int,
    eod: int | Collection[int] | None = None,
    sampling: Sampling | None = None,
    on_token: Callable[[int, int | None], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt (at least one token id each) and return the new ids. Collective over the world: all ranks
    compute the same tokens, because experts live on all of them. Experts see exact rows, whatever the dispatcher.

    What follows a prompt does not depend on the other prompts, but for the seed, which is sampling.seed + its place.

    Args:
        model: a ``GPTModel``, perhaps sharded.
        vocab_size: ids from here on are padding and never drawn.
        context_length: positions the model has. Beyond it, the model goes on with the last half of them as its prompt.
        eod: the token that ends a text, or all that do; not returned.
        on_token: called with (place of the prompt, token) as soon as a token is drawn, and with None when a text has ended.
    """
    sampling = sampling or Sampling()
    ends = frozenset(() if eod is None else (eod,) if isinstance(eod, int) else eod)
    with _for_generation(model):
        batch = _Batch(model, prompts, ctx, context_length)
        generators = [torch.Generator().manual_seed(sampling.seed + place) for place in range(len(prompts))]
        running = [True] * len(prompts)
        for _ in range(sampling.max_new_tokens):
            logits_BV = batch.next_logits()[:, :vocab_size]
            drawn = [draw(row, sampling, generator) for row, generator in zip(logits_BV, generators, strict=True)]
            for place, token in enumerate(_agree(drawn, ctx)):
                if not running[place]:
                    continue
                running[place] = token not in ends
                if running[place]:
                    batch.rows[place].append(token)
                if on_token is not None:
                    on_token(place, token if running[place] else None)
            if not any(running):
                break
    return [row[len(prompt) :] for row, prompt in zip(batch.rows, prompts, strict=True)]


@contextmanager
def _for_generation(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with exact_dispatch(model):
            yield
    finally:
        model.train(was_training)
        reshard(model)


class _Batch:
    """Rows of tokens of different lengths, and the cache with what the model has seen of them.

    Attributes:
        rows: all tokens of each row; the caller appends to them. A row that has ended stays as it is.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[list[int]], ctx: ParallelContext, context_length: int
    ) -> None:
        if not prompts or not all(prompts):
            raise ValueError("generation needs at least one token to continue in every prompt")
        self.rows = [list(prompt) for prompt in prompts]
        self._model, self._ctx, self._context = model, ctx, context_length
        self._multiple = ctx.tp.size if ctx.sequence_parallel else 1  # a sequence is cut over tensor-parallel ranks
        self._first = [max(len(row) - context_length, 0) for row in self.rows]  # what lies before is forgotten
        self._cache: KVCache | None = None

    def next_logits(self) -> Tensor:
        """fp32 logits [B, V] on the CPU of the token after each row."""
        for place, row in enumerate(self.rows):
            if len(row) - self._first[place] > self._context:
                self._first[place] = len(row) - max(self._context // 2, 1)
                self._cache = None
        if self._cache is not None:
            return self._forward([row[-1:] for row in self.rows], self._cache, new=True)
        cache: KVCache = self._model.new_cache(self._context + _CHUNK + self._multiple)  # type: ignore[operator]
        self._cache = cache
        return self._forward([row[first:] for row, first in zip(self.rows, self._first, strict=True)], cache)

    def _forward(self, tokens: list[list[int]], cache: KVCache, new: bool = False) -> Tensor:
        """Logits after the last of each row's `tokens`, which are all that the row has or, with `new`, its newest one."""
        result: dict[int, Tensor] = {}
        for offset in range(0, max(map(len, tokens)), _CHUNK):
            chunk = [row[offset : offset + _CHUNK] for row in tokens]
            begin = [len(row) - first - 1 if new else offset for row, first in zip(self.rows, self._first, strict=True)]
            logits_BSV = self._step(chunk, begin, cache)
            for place, part in enumerate(chunk):
                if part and offset + len(part) == len(tokens[place]):
                    result[place] = logits_BSV[place, len(part) - 1].float().cpu()
        return torch.stack([result[place] for place in range(len(tokens))])

    def _step(self, chunk: list[list[int]], begin: list[int], cache: KVCache) -> Tensor:
        """Run tokens that start at position `begin` of each row. What is behind a row's tokens is padding."""
        width = -(-max(map(len, chunk)) // self._multiple) * self._multiple
        tokens_BS = torch.tensor([row + [0] * (width - len(row)) for row in chunk])
        positions_BS = torch.tensor(begin)[:, None] + torch.arange(width)
        device = self._ctx.device
        cache.place(positions_BS, device)
        logits_BSV: Tensor = self._model(
            tokens_BS.to(device),
            # Padding may lie beyond the last position that the model knows.
            position_ids_BS=positions_BS.clamp(max=self._context - 1).to(device),
            cache=cache,
        )
        return logits_BSV


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from fp32 logits: temperature, then top-k, then top-p."""
    temperature = float(torch.tensor(sampling.temperature, dtype=torch.float32))
    if temperature <= 0.0:
        return int(logits_V.argmax())
    # The largest is 0 then, so that none overflows, however low the temperature.
    logits_V = (logits_V - logits_V.max()) / temperature
    if 0 < sampling.top_k < logits_V.numel():
        threshold = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
    probs_V = torch.softmax(logits_V, dim=0)
    if sampling.top_p < 1.0:
        ordered_V, ids_V = probs_V.sort(descending=True, stable=True)
        before_V = ordered_V.cumsum(0) - ordered_V  # what more probable tokens have together; 0 for the first
        probs_V = probs_V.index_fill(0, ids_V[before_V >= sampling.top_p], 0.0)
        probs_V[ids_V[0]] = ordered_V[0]
    return int(torch.multinomial(probs_V, 1, generator=generator))


def _agree(tokens: list[int], ctx: ParallelContext) -> list[int]:
    """Rank 0's tokens: the last bits of the logits may differ between ranks."""
    if ctx.world.size == 1:
        return tokens
    box = torch.tensor(tokens, device=ctx.device)
    dist.broadcast(box, src=0, group=ctx.world.process_group)
    return [int(token) for token in box.tolist()]
