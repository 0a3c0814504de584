"""Write the gauges into docs/instruments.md, between its two marks: ``python -m megatron_lsh.moe.instruments``."""

from __future__ import annotations

from pathlib import Path

from megatron_lsh.moe.gauges import gauge_table
from megatron_lsh.moe.layer import GAUGES

START, END = "<!-- gauges -->\n", "<!-- /gauges -->"
DOCUMENT = Path(__file__).parents[2] / "docs" / "instruments.md"


def with_table(text: str) -> str:
    """The document with the table as it should be."""
    before, rest = text.split(START)
    return f"{before}{START}{gauge_table(GAUGES)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
