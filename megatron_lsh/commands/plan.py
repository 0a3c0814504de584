"""Find the layout and the dispatch with the least time per step on a cluster, before anything is started.

    python -m megatron_lsh plan --cluster cluster.yaml THE FLAGS OF pretrain_gpt_moe.py [--out plan.html]

Searches what the flags do not fix: TP, PP, CP, EP, micro-batch, sharded optimizer, recomputation; exact dispatch,
de-duplicated or LSH, and pieces. Times come from a model of the cluster that the file describes, not from a measurement
(docs/instruments.md). Give --global-batch-size, so that all layouts do the same work.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lsh.config import Config
from megatron_lsh.config.moe import WIRE_DTYPES
from megatron_lsh.config.settings import settings_of
from megatron_lsh.config.tool_flags import ToolParser, a_path, integer, real
from megatron_lsh.errors import ConfigError, exit_status
from megatron_lsh.families import BERT, GPT, SWIN, T5, Family
from megatron_lsh.observing.report.plan_page import Curves, PlanPage, render
from megatron_lsh.plan.cluster import Cluster, read_cluster
from megatron_lsh.plan.cost_model import gbit
from megatron_lsh.plan.figures import by_bandwidth, by_ranks
from megatron_lsh.plan.memory import GIB
from megatron_lsh.plan.search import Answer, Question, named_in, search
from megatron_lsh.plan.step_time import LIMITS
from megatron_lsh.plan.table import (
    change_lines,
    command_line,
    dispatch_words,
    distinct,
    layout_words,
    model_notes,
    parts,
    report,
)

MODELS: tuple[Family, ...] = (GPT, BERT, T5, SWIN)


def own_flags() -> ToolParser:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cluster", type=a_path, required=True, help="what the cluster is: a YAML or JSON file")
    parser.add_argument(
        "--model", choices=[family.name for family in MODELS], default="gpt", help="whose flags these are"
    )
    parser.add_argument("--nodes", type=integer(1), help="nodes to plan for (default: those of the file)")
    parser.add_argument("--top", type=integer(1, 100), default=10, help="how many of the best are listed")
    parser.add_argument(
        "--rates", nargs="*", type=real(above=0, at_most=1),
        help="shares of the rows that LSH may send (default: --lsh-target-rate; nothing after it: exact dispatch only)",
    )  # fmt: skip
    parser.add_argument("--wires", nargs="+", choices=("model", *WIRE_DTYPES), default=["model"],
                        help="numbers in which rows may travel")  # fmt: skip
    parser.add_argument(
        "--chunks", nargs="+", type=integer(1, 64), default=[1, 2, 4], help="pieces in which rows may travel"
    )
    parser.add_argument("--out", type=a_path, help="write a page with plots: an HTML file, or a folder for plan.html")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return exit_status(lambda: plan(sys.argv[1:] if words is None else words))


def plan(words: Sequence[str]) -> None:
    """Raises ConfigError."""
    own, flags = own_flags().parse_known_args(words)
    family = next(family for family in MODELS if family.name == own.model)
    cfg = family.parse(flags)
    cluster = read_cluster(own.cluster, own.nodes)
    question = question_of(cfg, named_in(flags, family.config), own)
    answer = search(question, cluster, lambda line: print(line, file=sys.stderr, flush=True))
    print(report(answer, cluster, own.top))
    command = command_line(family, without_own(flags), answer.candidates[0], cluster)
    print(f"\nThe first one:\n\n    {shlex.join(command)}")
    if own.out is not None:
        write_page(answer, cluster, own, shlex.join(command))


def write_page(answer: Answer, cluster: Cluster, own: argparse.Namespace, command: str) -> None:
    """Raises OSError."""
    path = page_path(own.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page(answer, cluster, own.top, command)), encoding="utf-8")
    print(f"\nwrote {path}")


def page(answer: Answer, cluster: Cluster, most: int, command: str) -> PlanPage:
    """What it shows."""
    best = distinct(answer.candidates, most)
    times = [candidate.cost.at() for candidate in best]
    bars = [
        (f"{number}. {dispatch_words(candidate)}", {part: 1e3 * seconds for part, seconds in parts(time)})
        for number, (candidate, time) in enumerate(zip(best, times, strict=True), 1)
    ]
    rows = [
        [f"{number}", f"{1e3 * time.total:.1f}", f"{candidate.memory / GIB:.1f}", candidate.limit,
         layout_words(candidate), dispatch_words(candidate)]
        for number, (candidate, time) in enumerate(zip(best, times, strict=True), 1)
    ]  # fmt: skip
    charts = [] if not cluster.networked else [
        Curves(
            "Step time and ranks", "The layout stays; data parallelism and the global batch grow with the nodes. Beyond "
            f"{cluster.ranks} ranks: model.", "ranks", "ms per step", by_ranks(answer.candidates),
        )
    ]  # fmt: skip
    if cluster.nodes > 1:
        here = cluster.across.bandwidth
        charts.insert(0, Curves(
            "Step time and bandwidth", f"Of every dispatch under its fastest layout. The cluster has {gbit(here)} per node; "
            "anything else: model.", "Gbit/s of a node", "ms per step", by_bandwidth(answer.candidates),
        ))  # fmt: skip
    return PlanPage(
        f"Plan for {cluster.name}",
        model_notes(answer, cluster),
        ("", "ms per step", "GiB", "limited by", "layout", "dispatch"),
        rows,
        bars,
        LIMITS,
        charts,
        change_lines(answer.candidates, cluster),
        command,
    )


def question_of(cfg: Config, fixed: frozenset[str], own: argparse.Namespace) -> Question:
    """What is asked. Raises ConfigError without a global batch."""
    if cfg.training.global_batch_size is None:
        raise ConfigError(
            "training.global_batch_size (absent) must be given, so that all layouts do the same work: set "
            "--global-batch-size"
        )
    # A file of settings fixes those that it changes.
    fixed |= {name for name, setting in settings_of(type(cfg)).items() if setting.get(cfg) != setting.default}
    rates = [str(cfg.lsh.lsh_target_rate)] if own.rates is None else [f"{rate:g}" for rate in own.rates]
    wires = tuple(None if wire == "model" else wire for wire in own.wires)
    return Question(
        cfg, fixed, tuple(dict.fromkeys(rates)), tuple(dict.fromkeys(wires)), tuple(dict.fromkeys(own.chunks))
    )


def without_own(flags: Sequence[str]) -> list[str]:
    """The flags without those of a dry run."""
    kept: list[str] = []
    own = ("--dry-run", "--dry-run-json", "--world-size")
    skip = False
    for word in flags:
        if skip and not word.startswith("-"):  # its value
            skip = False
            continue
        skip = word in own
        if word.split("=")[0] not in own:
            kept.append(word)
    return kept


def page_path(out: Path) -> Path:
    """The file that --out names."""
    return out if out.suffix.lower() in (".html", ".htm") else out / "plan.html"
