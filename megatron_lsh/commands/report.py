"""Compare runs on one HTML page: loss against steps, tokens, seconds and bytes; where time goes; what compression did.

    python -m megatron_lsh report runs/exact runs/gpt-moe-lsh --out report.html

A run is a folder with a metrics file (--metrics-jsonl), or the file itself. Figures per layer need
--moe-per-layer-logging. The others are compared with the first run. The page needs no other file and no network.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_lsh.config.tool_flags import ToolParser, a_path, a_text
from megatron_lsh.errors import exit_status
from megatron_lsh.observing.report.page import render
from megatron_lsh.observing.report.runs import read_runs


def main(words: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN_DIR", help="folder or metrics file of a run")
    parser.add_argument("--out", type=a_path, default=Path("report.html"), help="where to write the page")
    parser.add_argument("--names", nargs="+", type=a_text, help="what to call the runs (default: their folders)")
    parser.add_argument("--title", type=a_text, help="heading of the page")

    def work() -> None:
        arguments = parser.parse_args(words)
        if arguments.names is not None and len(arguments.names) != len(arguments.runs):
            parser.error(f"--names has {len(arguments.names)} names for {len(arguments.runs)} runs")
        write_page(arguments.runs, arguments.names, arguments.title, arguments.out)

    return exit_status(work)


def write_page(folders: list[Path], names: list[str] | None, title: str | None, out: Path) -> None:
    """Raises DataError."""
    runs = read_runs(folders, names)
    title = title or " against ".join(run.name for run in runs[:3]) + (" and others" if len(runs) > 3 else "")
    note = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {time.strftime('%Y-%m-%d %H:%M')}"
    out.write_text(render(runs, title, note), encoding="utf-8")
    print(f"wrote {out}")
