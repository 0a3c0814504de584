"""Damaged and hostile files of models: each ends in the right model, or in one error that names the file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_lsh.convert import load_hf, load_megatron, save_megatron
from megatron_lsh.convert.source import all_pieces
from megatron_lsh.errors import MegatronLSHError
from tests.convert.helpers import QUIET
from tests.convert.tiny import save_tiny

CASES = 60
VALUES = (None, True, False, 0, 1, -1, 2**40, 1e400, 0.5, "", "x", "../x", [], [1], {}, {"a": 1}, "\ud800")


def damaged(content: bytes, state: random.Random) -> bytes:
    """Bytes replaced, cut off, doubled, or nested deeply."""
    kind, place = state.randrange(5), state.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place // 2 :]
    if kind == 2:
        return b"[" * 50_000
    result = bytearray(content)
    for _ in range(state.choice((1, 1, 8))):
        result[state.randrange(min(len(result), state.choice((64, 4096, len(result)))))] = state.randrange(256)
    return bytes(result)


def changed(content: bytes, state: random.Random) -> bytes:
    """A JSON object in which a value is another one, of any type, or a key is gone."""
    document = json.loads(content)
    where = document
    while True:
        key = state.choice(sorted(where))
        if isinstance(where[key], dict) and where[key] and state.random() < 0.8:
            where = where[key]
            continue
        if state.random() < 0.2:
            del where[key]
        else:
            where[key] = state.choice(VALUES)
        return json.dumps(document).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    save_tiny(folder / "hf", "mixtral", num_hidden_layers=1)
    save_megatron(load_hf(folder / "hf"), folder / "megatron", checks=QUIET)
    return {"hf": folder / "hf", "megatron": folder / "megatron"}


@pytest.mark.parametrize("seed", [0])
def test_readers_of_models(good: dict[str, Path], tmp_path: Path, seed: int, cases: int = CASES) -> None:
    state = random.Random(seed)
    refused = 0
    for case in range(cases):
        kind = state.choice(sorted(good))
        folder = tmp_path / str(case)
        shutil.copytree(good[kind], folder)
        file = state.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        change = changed if file.suffix == ".json" and state.random() < 0.7 else damaged
        file.write_bytes(change(file.read_bytes(), state))
        try:
            source = load_hf(folder) if kind == "hf" else load_megatron(folder)
            for rows in all_pieces(source):
                source.read(rows)
        except MegatronLSHError as error:
            refused += 1
            assert str(folder) in str(error), f"case {case}: {file.name}: {error}"
        except Exception as error:
            raise AssertionError(f"case {case}, {file.relative_to(folder)}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert refused > cases // 4
