"""How far the gradients of a training step are from those of exact dispatch: minutes, where two training runs take hours.

    python -m benchmarks.gradient_error                      # trains the model exactly first, 825 of 2,000 steps
    python -m benchmarks.gradient_error --load FOLDER        # or takes it from the checkpoint of such a run
    python -m benchmarks.gradient_error --variants "10%" "20%" --group-rows 8192 --batches 4 --name gradient_error_8192

Two nodes emulated by one process, as in benchmarks/node_quality.py, whose model and data these are. The same weights see the
same micro-batches with each dispatcher. Figures, over --batches micro-batches:

    error     sum |g' - g|^2 / sum |g|^2, g the exact gradient of a micro-batch, by kind of parameter
    of noise  all of it over sum |g - mean g|^2: what compression adds to the noise that a micro-batch has by itself, and as
              much as a batch would add that is smaller by this share
    loss      of the micro-batches above exact, nats, for weights that were trained exactly
    kept by   |mean (g' - g)|^2 over the mean of |g' - g|^2: 1 / K of K micro-batches if their errors are independent and
    the mean  average out, 1 if they are the same in all
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import figures
from benchmarks.clustering import running
from benchmarks.common import ROOT, finish, progress, result_path, spread, start_training, table, write_result
from benchmarks.node_quality import Job, flags_for, kept_in
from megatron_lsh.families.losses import MAIN
from megatron_lsh.parallel.parameters import local

STEPS, AFTER, ROWS = 2000, 825, 2048

#: A variant of benchmarks/node_quality.py, and further flags.
VARIANTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"{rate}%": ("node, one fit", ("--lsh-target-rate", rate / 100)) for rate in (10, 20, 25, 30, 35, 50)},
    "20%, blocks of 128": ("node, blocks of 128", ()),
    "20%, 4 steps of refinement": ("node, one fit", ("--lsh-refine-steps", 4)),
    "20%, means": ("node, one fit", ("--lsh-representative", "mean")),
    "20%, no interpolation": ("node, one fit", ("--lsh-residual", "none", "--lsh-representative", "member")),
    "20% per rank, own node exact": ("rank, own node exact", ()),
    "20% per rank": ("rank", ()),
}
KINDS = ("experts", "router", "others")
#: What the figure is made of, by rows per node and expert.
FILES = {ROWS: "gradient_error", 4 * ROWS: "gradient_error_8192"}


class Found(NamedTuple):
    """Of each micro-batch: its gradient by kind of parameter, and its loss."""

    gradients: dict[str, Tensor]
    losses: list[float]


def trained(folder: Path, steps: int) -> Path:
    """A checkpoint of the exact run after so many steps; made, or gone on with, unless it is there."""
    place = folder / f"exact-after-{steps}"
    state, log = place / "state", place / "log.txt"
    if iteration_of(state) != steps:
        print(f"training {steps} steps: progress is in {log}", flush=True)
        words = [*flags_for(Job("exact", 1, STEPS, ROWS)), *kept_in(place), "--exit-interval", steps]
        finish(start_training(words, log), log)
    return state


def iteration_of(state: Path) -> int | None:
    """Of the newest checkpoint; None where there is none."""
    latest = state / "latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.exists() else None


def gradients(variant: str, extra: tuple[Any, ...], load: Path, count: int, group_rows: int) -> Found:
    """Of ``count`` micro-batches with so many rows per node and expert, for the weights of this checkpoint."""
    by_kind: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    losses = []
    words = [*flags_for(Job(variant, 1, STEPS, group_rows)), *extra, "--load", load, "--finetune"]
    with running(words) as (run, batches):
        run.model.train()
        step = run.step
        for number in range(count):
            run.model.set_iteration(number, STEPS)
            step.optimizer.zero_grad(set_to_none=True)
            sums = step.pipeline.train(batches, 1, step.forward_step, lambda found: found.objective(1, None))
            total, tokens = sums[MAIN].tolist()
            losses.append(total / tokens)
            parts: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
            for name, parameter in run.model.named_parameters():
                kind = "experts" if ".experts." in name else "router" if "router" in name else "others"
                if parameter.grad is not None:
                    parts[kind].append(local(parameter.grad).detach().flatten())
            for kind, tensors in parts.items():
                by_kind[kind].append(torch.cat(tensors))
    return Found({kind: torch.stack(each) for kind, each in by_kind.items()}, losses)


def compare(found: Found, exact: Found) -> dict[str, Any]:
    """The figures of the module's docstring."""
    off = {kind: found.gradients[kind] - exact.gradients[kind] for kind in KINDS}
    count = len(exact.losses)
    noise = sum(_energy(g - g.mean(0)) for g in exact.gradients.values()) * count / (count - 1)
    every = sum(map(_energy, off.values()))
    of_mean = sum(_energy(each.mean(0)) for each in off.values()) * count
    return {
        **{kind: _energy(off[kind]) / _energy(exact.gradients[kind]) for kind in KINDS},
        "all": every / sum(map(_energy, exact.gradients.values())),
        "of noise": every / noise,
        "kept by the mean": of_mean / every,
        "loss": [ours - theirs for ours, theirs in zip(found.losses, exact.losses, strict=True)],
    }


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())


def report(results: dict[str, dict[str, Any]]) -> str:
    together = ("all", "of noise", "kept by the mean")
    header = ["dispatch", *(f"{kind}, error" for kind in KINDS), *together, "loss"]
    lines = [
        [
            name,
            *(f"{r[key]:.1%}" for key in (*KINDS, *together)),
            f"{statistics.mean(r['loss']):+.3f} ({spread(r['loss'])})",
        ]
        for name, r in results.items()
    ]
    return table(header, lines)


def by_rate(results: dict[str, dict[str, Any]]) -> dict[float, dict[str, Any]]:
    """Those that differ by the rate alone, the lowest first."""
    named = {name.rstrip("%"): found for name, found in results.items()}
    return dict(sorted((float(name), found) for name, found in named.items() if name.isdigit()))


def power_of_rate(results: dict[str, dict[str, Any]]) -> float | None:
    """a where error falls as rate^-a, between the lowest and the highest rate measured."""
    rates = by_rate(results)
    if len(rates) < 2:
        return None
    low, high = min(rates), max(rates)
    return math.log(rates[low]["all"] / rates[high]["all"]) / math.log(high / low)


def drawn() -> Any:
    """Noise and loss by rate, for groups of two sizes, and of other ways at 20%."""
    found = {rows: json.loads(result_path(name).read_text())["results"] for rows, name in FILES.items()}
    others = ["20%, blocks of 128", "20% per rank, own node exact", "20% per rank"]
    figure, axes = figures.panels(2, 10, 4.8)
    shown = (
        (lambda r: r["of noise"], "gradient: error / noise of a micro-batch"),
        (lambda r: statistics.mean(r["loss"]), "loss above exact, nats (weights of exact training)"),
    )
    for axis, (figure_of, title) in zip(axes, shown, strict=True):
        for rows, results in found.items():
            rates = by_rate(results)
            line = [figure_of(r) for r in rates.values()]
            axis.plot(list(rates), line, "o-", label=f"a node's {rows:,} rows, one fit")
        for way, marker in zip(others, "sD^", strict=True):
            if way in found[ROWS]:
                axis.plot([20], [figure_of(found[ROWS][way])], marker, label=way)
        axis.set(xscale="log", yscale="log", xlabel="rows sent across the network, %", title=title)
        ticks = list(by_rate(found[ROWS]))
        axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        figures.legend_below(axis, 2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=Path, help="folder of a checkpoint of the exact run of benchmarks/node_quality.py"
    )
    parser.add_argument("--after", type=int, default=AFTER, help="steps of exact training, without --load")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), metavar="VARIANT", default=list(VARIANTS))
    parser.add_argument("--batches", type=int, default=8, help="micro-batches")
    parser.add_argument("--group-rows", type=int, default=ROWS, help="rows per node and expert, half of its tokens")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gradient_error")
    parser.add_argument("--name", default="gradient_error", help="of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = arguments.load or trained(arguments.folder, arguments.after)
    steps, began = iteration_of(load), time.monotonic()
    how = load, arguments.batches, arguments.group_rows
    exact, results = gradients("exact", (), *how), {}
    for number, name in enumerate(arguments.variants):
        results[name] = compare(gradients(*VARIANTS[name], *how), exact)
        progress(number + 1, len(arguments.variants), began, "measuring")
    batches = f"{arguments.batches} micro-batches of {2 * arguments.group_rows:,} tokens"
    print(f"{steps} steps of exact training before, {batches}\n\n{report(results)}\n")
    power = power_of_rate(results)
    if power is not None:
        print(f"the error falls as rate^-{power:.1f}")
    found = {
        "steps": steps,
        "batches": arguments.batches,
        "group rows": arguments.group_rows,
        "power of the rate": power,
        "results": results,
    }
    print(f"wrote {write_result(arguments.name, found)}")
    if arguments.name in FILES.values():
        figures.save(drawn(), "gradient_error")


if __name__ == "__main__":
    main()
