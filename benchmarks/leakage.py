"""Does LSH show the future? A causal model must not predict tokens that nothing before them tells of.

    python -m benchmarks.leakage --seeds 1 2 3 --steps 400

A cluster joins rows of different positions and sequences, so that what is sent for an early token depends on later ones.
Whether training finds a use for that is asked with tokens that cannot be predicted: independent and uniform over a
vocabulary of thousands, each batch read once (memorising looks like a leak). The best loss without a leak is log V.

    once     sequences of independent tokens
    twins    every sequence stands twice, the second moved by one: at each position of the first, the next token stands at
             the same position of the second, in the row most likely to share its cluster. Only the first is scored

A run in which nothing is found says little by itself, so controls that do leak are trained beside: ``expert choice``, in the
first task (an expert that takes one of two neighbours tells each something of the other; Wang et al. 2024, arXiv:2408.15664,
discuss it and show it at scale), and ``planted`` (what is sent for a token holds half of the next one's row). If one of them
does not fall below log V, no result is reported. A leak too small to lower a noisy loss shows in the last figure, ``told``:
how much the loss of the trained model rises when only what it must not know is replaced.

The channel itself is measured by changing the second half of every sequence, and looking at the logits of the first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, mean_and_interval, progress, result_path, table, write_result
from benchmarks.quality import BUCKET, IDENTITY, INTERPOLATE, LSH, NONE
from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.families import GPT
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.moe.dispatcher import Dispatcher
from megatron_lsh.moe.experts import Experts
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.layer_pass import LayerPass
from megatron_lsh.moe.router import Routing
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext, offline_context


@dataclass(frozen=True)
class Size:
    """The experiment's size: V tokens, S positions, B sequences per step."""

    vocab: int = 4096
    length: int = 16
    batch: int = 64
    hidden: int = 64
    layers: int = 2
    steps: int = 400
    lr: float = 3e-3
    position_scale: float = 1.0
    """of the position embeddings, untrained: large ones make rows of one position alike"""


EXPERTS = 8
RESTORATIONS: dict[str, list[Any]] = {
    "interpolate": INTERPOLATE,
    "interpolate means": [*INTERPOLATE, "--lsh-representative", "mean"],
    "none": NONE,
    "identity": IDENTITY,
    "lowrank": [*LSH, "--lsh-residual", "lowrank"],
    "straight-through": [*NONE, "--lsh-gradient", "straight-through"],
    "paper": BUCKET,
}
RATES = (5, 20, 50)
#: Whose rows cluster together, on 2 nodes of 2 ranks that one process emulates (benchmarks/emulation.py).
SCOPES = {
    f"{name} 50% per {scope}": ["--moe-token-dispatcher-type", f"benchmarks.emulation:{way}_2x2", *flags[len(LSH) :],
                                "--lsh-target-rate", 0.5]
    for name, flags in RESTORATIONS.items() if name != "lowrank"  # whose maps are a rank's own
    for scope, way in (("rank", "rank"), ("rank, own node exact", "rank_own_exact"), ("node", "node"))
}  # fmt: skip
VARIANTS: dict[str, list[Any]] = {
    "exact": [],
    "expert choice": [],
    "planted": [],
    **{
        f"{name} {rate}%": [*flags, "--lsh-target-rate", rate / 100]
        for name, flags in RESTORATIONS.items()
        if name != "paper"
        for rate in RATES
    },
    "paper": BUCKET,
    # the remedy: what is sent are rows of the micro-batch before
    **{f"past {rate}%": ["--moe-token-dispatcher-type", "benchmarks.past:past", "--lsh-target-rate", rate / 100]
       for rate in RATES},
    **SCOPES,
}  # fmt: skip
#: What has no rows of twins in one cluster.
ONLY_ONCE = {"expert choice", *SCOPES}


class Control(nn.Module):
    """In the place of a layer's dispatcher, on the way to it."""

    def __init__(self, exact: Dispatcher, size: Size) -> None:
        super().__init__()
        self.exact, self.batch = exact, size.batch

    def set_iteration(self, iteration: int, total: int | None = None) -> None:
        """Nothing changes in the course of a run."""


class ExpertChoice(Control):
    """Every expert takes one of each two neighbouring positions of a sequence, in place of the router's choices.

    Zhou et al. 2022 (arXiv:2202.09368) with a group of two tokens: to be left out tells a token that the other one's logit
    is larger.
    """

    def __init__(self, exact: Dispatcher, size: Size) -> None:
        super().__init__(exact, size)
        self.gate = nn.Linear(size.hidden, EXPERTS, bias=False)

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass) -> Tensor:
        logits_TE = self.gate(x_TD)
        pairs = logits_TE.view(-1, 2, self.batch, logits_TE.shape[1])
        chosen_TE = (pairs == pairs.amax(1, keepdim=True)).view_as(logits_TE)
        chosen = replace(
            routing,
            expert_ids_TK=torch.where(chosen_TE, torch.arange(logits_TE.shape[1]), -1),
            probs_TK=logits_TE.sigmoid() * chosen_TE,
            tokens_per_expert_E=chosen_TE.sum(0),
            complete=False,
        )
        return self.exact(x_TD, chosen, experts, p)


class Planted(Control):
    """Every token shares a cluster with the next one of its sequence, and the mean is sent."""

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts, p: LayerPass) -> Tensor:
        next_TD = torch.cat([x_TD[self.batch :], x_TD[-self.batch :]])
        return self.exact(torch.lerp(x_TD, next_TD, 0.5), routing, experts, p)


CONTROLS = {"expert choice": ExpertChoice, "planted": Planted}


def configure(flags: Sequence[Any], size: Size, seed: int) -> Config:
    """A GPT of MoE layers only: 8 experts, top-2, no dropout."""
    arguments = [
        "--num-layers", size.layers, "--hidden-size", size.hidden, "--num-attention-heads", 4,
        "--seq-length", size.length, "--max-position-embeddings", size.length, "--normalization", "RMSNorm", "--swiglu",
        "--disable-bias-linear", "--attention-dropout", 0, "--hidden-dropout", 0, "--num-experts", EXPERTS,
        "--moe-ffn-hidden-size", size.hidden, "--moe-router-topk", 2, "--moe-aux-loss-coeff", 1e-2,
        "--micro-batch-size", size.batch, "--global-batch-size", size.batch, "--lr", size.lr, "--seed", seed,
        "--train-iters", size.steps, "--device", "cpu", "--mock-data", "--tokenizer-type", "NullTokenizer",
        "--vocab-size", size.vocab, *flags,
    ]  # fmt: skip
    return validate(parse_args([str(argument) for argument in arguments]), world_size=1)


def build(variant: str, size: Size, seed: int, ctx: ParallelContext | None = None) -> GPTModel:
    """An untrained model with this variant of :data:`VARIANTS` in every layer."""
    torch.manual_seed(seed)
    ctx = ctx or offline_context(device="cpu")
    model = GPT.build(configure(VARIANTS[variant], size, seed), size.vocab, ctx, MoETelemetry(ctx.device))
    assert isinstance(model, GPTModel)
    with torch.no_grad():
        model.embedding.position_embeddings.weight.mul_(size.position_scale)
    if variant in CONTROLS:
        for module in [module for module in model.modules() if isinstance(module, MoELayer)]:
            module.dispatcher = CONTROLS[variant](module.dispatcher, size)  # type: ignore[assignment]
    return model


def once(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, next tokens and what is scored, [B, S] each."""
    text = torch.randint(size.vocab, (size.batch, size.length + 1), generator=generator)
    return text[:, :-1], text[:, 1:], torch.ones(size.batch, size.length, dtype=torch.bool)


def twins(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same, where sequence b + B/2 is sequence b moved by one."""
    text = torch.randint(size.vocab, (size.batch // 2, size.length + 2), generator=generator)
    tokens, labels = (torch.cat([text[:, i : i + size.length], text[:, i + 1 : i + 1 + size.length]]) for i in (0, 1))
    scored = torch.arange(size.batch)[:, None].expand(-1, size.length) < size.batch // 2
    return tokens, labels, scored


Task = Callable[[Size, torch.Generator], tuple[Tensor, Tensor, Tensor]]
TASKS: dict[str, Task] = {"once": once, "twins": twins}
SIZES = {
    "once": Size(),
    # Two sequences whose positions weigh more than their tokens: at 50% a cluster is a token and its twin's.
    "twins": Size(batch=2, length=256, position_scale=4.0),
}


def clip(model: GPTModel) -> None:
    """Gradients of a norm of at most 1."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def losses(
    model: GPTModel, task: Task, size: Size, seed: int, settle: Callable[[GPTModel], object] = clip
) -> Iterator[float]:
    """Train, and yield each step's mean loss of the scored tokens before the step; no token was seen before.

    ``settle``: what is done to gradients before a step; where several ranks train, their average is taken too.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(size.steps):
        for group in optimizer.param_groups:  # warm-up, then a straight line to zero
            group["lr"] = size.lr * min((step + 1) / 20, 1 - step / size.steps)
        model.set_iteration(step, size.steps)
        tokens_BS, labels_BS, scored_BS = task(size, generator)
        loss_BS, aux = model(tokens_BS, labels_BS)
        yield float(loss_BS.detach()[scored_BS].mean())
        optimizer.zero_grad()
        (loss_BS.mean() + aux).backward()
        settle(model)
        optimizer.step()


def windows(values: Sequence[float]) -> list[float]:
    """Means of the eighths of a run: a leak may be found and lost again."""
    length = max(len(values) // 8, 1)
    return [statistics.mean(values[start : start + length]) for start in range(0, len(values) - length + 1, length)]


def below(values: Sequence[float], vocab: int) -> float:
    """Nats below log V in the best eighth of a run. Above 0: the future was seen, as far as chance allows."""
    return math.log(vocab) - min(windows(values))


@torch.no_grad()
def channel(model: GPTModel, size: Size, seed: int) -> float:
    """How much logits of the first half of all sequences change with the second half: root mean square, over theirs."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(size.vocab, (size.batch, size.length), generator=generator)
    other_BS, half = tokens_BS.clone(), size.length // 2
    other_BS[:, half:] = torch.randint(size.vocab, other_BS[:, half:].shape, generator=generator)
    logits, changed = (model(batch)[:, :half].float() for batch in (tokens_BS, other_BS))
    return float((logits - changed).square().mean().sqrt() / logits.square().mean().sqrt())


def beside_strangers(tokens_BS: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The second half of the sequences replaced, and the losses of the first half: what do twins tell?"""
    changed_BS, half = tokens_BS.clone(), size.batch // 2
    changed_BS[half:] = torch.randint(size.vocab, (size.batch - half, size.length), generator=generator)
    return changed_BS, torch.arange(size.batch)[:, None].expand(-1, size.length) < half


def after_a_cut(tokens_BS: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All tokens from some position on replaced, and the losses of the position before: what does the future tell?"""
    cut = int(torch.randint(1, size.length, (), generator=generator))
    changed_BS = tokens_BS.clone()
    changed_BS[:, cut:] = torch.randint(size.vocab, (size.batch, size.length - cut), generator=generator)
    return changed_BS, (torch.arange(size.length) == cut - 1).expand(size.batch, -1)


@torch.no_grad()
def told(model: GPTModel, task: str, size: Size, seed: int, batches: int = 100) -> tuple[float, float]:
    """How much the loss of a token rises when what it must not know is replaced, in nats: (mean, standard error).

    Free of what a model loses by training on noise, which differs from dispatcher to dispatcher.
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    replaced = after_a_cut if task == "once" else beside_strangers
    rises = []
    for _ in range(batches):
        tokens_BS, labels_BS, _ = TASKS[task](size, generator)
        changed_BS, scored_BS = replaced(tokens_BS, size, generator)
        true, changed = (model(tokens, labels_BS)[0][scored_BS].mean() for tokens in (tokens_BS, changed_BS))
        rises.append(float(changed - true))
    return statistics.mean(rises), statistics.stdev(rises) / batches**0.5


def run(variant: str, task: str, size: Size, seed: int) -> dict[str, Any]:
    """One training run, and what is judged."""
    model = build(variant, size, seed)
    untrained = channel(model, size, seed)
    values = list(losses(model, TASKS[task], size, seed))
    return {
        "windows": windows(values),
        "below_log_v": below(values, size.vocab),
        "channel_untrained": untrained,
        "channel_trained": channel(model, size, seed),
        "told": told(model, task, size, seed),
    }


MARGIN = 0.02
"""nats: a control must fall below log V by as much, and what falls by as much is a leak that training finds"""


def missing_power(results: Sequence[dict[str, Any]]) -> list[str]:
    """Controls that did not fall below log V: with one of them, nothing can be said of the others."""
    return [
        f"{entry['variant']}, {entry['task']}, seed {entry['seed']}: {entry['below_log_v']:+.3f} nats below log V"
        for entry in results
        if entry["variant"] in CONTROLS and entry["below_log_v"] < MARGIN
    ]


def report(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one row per variant and task. Of several seeds the lowest loss, and what was told with its 95%
    interval; of one seed with the standard error over its batches."""
    rows = []
    for variant, task in dict.fromkeys((entry["variant"], entry["task"]) for entry in results):
        runs = [entry for entry in results if (entry["variant"], entry["task"]) == (variant, task)]
        found = [run["told"] for run in runs if run["told"]]  # the first runs that were recorded have none
        said = " ± ".join(f"{value:.4f}" for value in found[0]) if len(found) == 1 else ""
        said = mean_and_interval([rise for rise, _ in found], 4) if len(found) > 1 else said
        channels = [statistics.mean(run[key] for run in runs) for key in ("channel_untrained", "channel_trained")]
        rows.append(
            (
                variant, task, len(runs), f"{max(run['below_log_v'] for run in runs):+.4f}",
                said, *(f"{value:.0e}" for value in channels),
            )
        )  # fmt: skip
    header = ("dispatcher", "task", "seeds", "nats below log V", "told, nats", "channel, untrained",
              "channel, trained")  # fmt: skip
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "leakage", help="finished runs are kept here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    variants = dict.fromkeys([*CONTROLS, *arguments.variants])  # without controls there is no result
    jobs = [
        (variant, task, seed)
        for seed in arguments.seeds
        for task in arguments.tasks
        for variant in variants
        if task == "once" or variant not in ONLY_ONCE
    ]
    results, started = [], time.monotonic()
    for done, (variant, task, seed) in enumerate(jobs, 1):
        size = replace(SIZES[task], steps=arguments.steps)
        key = {"variant": variant, "task": task, "seed": seed, "size": asdict(size)}
        name = f"{variant}-{task}-{seed}-{size.steps}".replace(" ", "-").replace("%", "")
        path = arguments.folder / f"{name}.json"
        if not path.exists() or json.loads(path.read_text()).get("size") != asdict(size):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(key | run(variant, task, size, seed)) + "\n")
        results.append(json.loads(path.read_text()))
        progress(done, len(jobs), started, f"{variant}, {task}, seed {seed}")
    if missing := missing_power(results):
        raise SystemExit("no result, because a control that leaks was not found out:\n" + "\n".join(missing))
    print(report(results))
    path = write_result("leakage", {"runs": merged(result_path("leakage"), results)})
    print(f"log V = {math.log(Size.vocab):.4f}; wrote {path}")


def merged(path: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a file of results, those of them that were made again replaced, and the new ones behind."""
    earlier = json.loads(path.read_text())["runs"] if path.exists() else []
    named = {(run["variant"], run["task"], run["seed"], str(run["size"])): run for run in [*earlier, *results]}
    return list(named.values())


if __name__ == "__main__":
    main()
