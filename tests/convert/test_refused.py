"""Damaged and foreign inputs: each refused with its name and a remedy, and nothing half-written left."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import save_file
from torch import Tensor

from megatron_lsh.checkpoint.lock import SaveLock
from megatron_lsh.convert import Checks, load_hf, load_native, save_hf, save_megatron, save_native
from megatron_lsh.convert.logits import our_logits
from megatron_lsh.convert.safetensors import SafetensorsReader
from megatron_lsh.convert.source import Rows, Source
from megatron_lsh.errors import CheckpointError
from megatron_lsh.parallel.owner import Owner
from tests.checkpoint.disks import tmpfs
from tests.convert.helpers import QUIET, contents, hf_tensors
from tests.convert.tiny import hf_logits, load_pretrained, prompts, save_tiny

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
Change = Callable[[dict[str, Tensor]], None]


def delete(tensors: dict[str, Tensor]) -> None:
    del tensors[EXPERT]


def rename(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT.replace("w3", "w4")] = tensors.pop(EXPERT)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT][:-1].contiguous()


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].clone()
    tensors[EXPERT][3, 5] = float("nan")


def integers(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.int8)


def eight_bits(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.float8_e4m3fn)


def counter(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.steps"] = torch.tensor([3])


def surplus(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    save_tiny(folder, "mixtral")
    return folder


def copy_of(model: Path, folder: Path, change: Change | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = hf_tensors(model)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete, rf"{EXPERT} is missing.*incomplete or of another model; download it again"),
        (rename, rf"{EXPERT} is missing; {EXPERT.replace('w3', 'w4')} in model.safetensors is left over"),
        (reshape, rf"{EXPERT} in model.safetensors has shape \[47, 32\] and should have \[48, 32\]"),
        (integers, rf"{EXPERT} in model.safetensors is of type I8, which must be one of BF16.*quantized models"),
        (eight_bits, rf"{EXPERT} in model.safetensors is of type F8_E4M3, which must be one of BF16.*quantized models"),
        (counter, r"model.layers.0.mlp.steps in model.safetensors is of type I64"),
        (surplus, r"model.layers.1.self_attn.q_proj.bias in model.safetensors is left over"),
    ],
)
def test_tensors_that_do_not_fit_are_found_before_anything_is_written(
    model: Path, change: Change, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_hf(copy_of(model, tmp_path / "hf", change))


@pytest.mark.parametrize("verify", [True, False])
def test_nan(model: Path, verify: bool, tmp_path: Path) -> None:
    """Found on the way, whether verified or not."""
    source = load_hf(copy_of(model, tmp_path / "hf", poison))
    checks = Checks(verify=verify, say=lambda text: None)
    for save in (save_native, save_hf, save_megatron):
        with pytest.raises(CheckpointError, match=rf"hf: {EXPERT} holds NaN or infinity: take an earlier checkpoint"):
            save(source, tmp_path / "out", checks=checks)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def truncate(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * keep))


def test_damaged_files(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "truncated")
    truncate(folder, 0.7)
    damaged = r"model.safetensors cannot be read as safetensors \(.*\): download or copy the file again"
    with pytest.raises(CheckpointError, match=damaged):
        load_hf(folder)
    truncate(folder, 0.001)
    with pytest.raises(CheckpointError, match=damaged):
        load_hf(folder)
    folder = copy_of(model, tmp_path / "header")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[10:14] = b"\0\0\0\0"
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=damaged):
        load_hf(folder)
    folder = copy_of(model, tmp_path / "longer")
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"xyz")
    with pytest.raises(CheckpointError, match=damaged):
        load_hf(folder)


@pytest.mark.parametrize("places", [[(0, 8), (4, 12)], [(0, 8), (12, 20)], [(0, 8), (0, 8)]])
def test_tensors_that_share_bytes_or_leave_some_out(places: list[tuple[int, int]], tmp_path: Path) -> None:
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in zip("ab", places, strict=True)
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(max(end for _, end in places)))
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors"):
        SafetensorsReader([file])


def test_the_single_file_beside_an_index_is_read_as_by_transformers(tmp_path: Path) -> None:
    """Left behind by a second save_pretrained with another shard size."""
    save_tiny(tmp_path / "shards", "llama", seed=1)
    save_hf(load_hf(tmp_path / "shards"), tmp_path / "both", max_shard=20_000, checks=QUIET)
    assert load_hf(tmp_path / "both").notices == []
    save_tiny(tmp_path / "single", "llama", seed=2)
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "both")
    source = load_hf(tmp_path / "both")
    expected = hf_logits(load_pretrained(tmp_path / "both"), prompts())
    torch.testing.assert_close(our_logits(source, prompts()), expected, rtol=0, atol=1e-4)
    assert "model.safetensors.index.json is passed over, as transformers does" in source.notices[0]


def test_missing_files(model: Path, tmp_path: Path) -> None:
    save_hf(load_hf(model), tmp_path / "sharded", max_shard=20_000, checks=QUIET)
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {shard.name} is not there: download the missing files"):
        load_hf(tmp_path / "sharded")
    folder = copy_of(model, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"neither model.safetensors nor .*but pytorch_model.bin.*only safetensors"
    ):
        load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_hf(folder)


def test_unsupported_architecture(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_oss"}))
    with pytest.raises(CheckpointError, match=r"config.json: model_type \(gpt_oss\) must be one of mixtral"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        load_hf(folder)


def test_output_that_differs_from_its_embedding(tmp_path: Path) -> None:
    save_tiny(tmp_path / "hf", "qwen3")
    tensors = hf_tensors(tmp_path / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_hf(tmp_path / "hf")


def test_native_checkpoints(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no native checkpoint"):
        load_native(tmp_path)
    save_native(load_hf(model), tmp_path / "native", checks=QUIET)
    with pytest.raises(CheckpointError, match=r"has no iteration 7; there are none: drop --ckpt-step"):
        load_native(tmp_path / "native", 7)
    file = next((tmp_path / "native/release").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged \(SHA-256 .*: take an earlier one"):
        load_native(tmp_path / "native")


def test_nothing_is_overwritten(model: Path, tmp_path: Path) -> None:
    source = load_hf(model)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"used already exists: give another --save, or remove it"):
        save_hf(source, tmp_path / "used", checks=QUIET)
    assert contents(tmp_path) == ["used", "used/notes.txt"]
    save_native(source, tmp_path / "native", checks=QUIET)
    for save in (save_native, save_megatron):
        with pytest.raises(CheckpointError, match=r"native already holds release"):
            save(source, tmp_path / "native", checks=QUIET)


class Interrupted:
    """A source during whose reading something happens."""

    def __init__(self, source: Source, error: BaseException, after: int) -> None:
        self.what, self.cfg, self.tensors, self.origin = source.what, source.cfg, source.tensors, source.origin
        self.pieces, self.culprits, self._source, self._error, self._left = (
            source.pieces,
            source.culprits,
            source,
            error,
            after,
        )

    def read(self, rows: Rows) -> Tensor:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._source.read(rows)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_interruptions_leave_nothing(model: Path, error: BaseException, tmp_path: Path) -> None:
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    for save in (save_hf, save_native, save_megatron):
        for after in (0, 10):
            with pytest.raises(expected):
                save(Interrupted(load_hf(model), error, after), tmp_path / "deep" / "out", checks=QUIET)
            assert contents(tmp_path) == []


def test_what_a_kill_left_is_cleared_away(model: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "native" / "release.incomplete"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="holds no native checkpoint"):
        load_native(tmp_path / "native")
    save_native(load_hf(model), tmp_path / "native", checks=QUIET)
    assert not leftover.exists()


def test_a_conversion_that_runs_is_left_alone(model: Path, tmp_path: Path) -> None:
    """Of another process, which has written some: this one is refused, and takes nothing away. A file in the way, too."""
    partial = tmp_path / "native" / "release.incomplete"
    other = subprocess.Popen(["sleep", "60"])
    try:
        started = int(Path(f"/proc/{other.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        lock = SaveLock(partial, replace(Owner.here(), pid=other.pid, started=started, token="other"))
        (partial / "__0_0.distcp").write_bytes(b"half")
        with pytest.raises(CheckpointError, match=rf"{partial}: another run saves there: .*{other.pid}"):
            save_native(load_hf(model), tmp_path / "native", checks=QUIET)
        assert (partial / "__0_0.distcp").read_bytes() == b"half"
    finally:
        other.kill()
        other.wait()
    save_native(load_hf(model), tmp_path / "native", checks=QUIET)
    assert not partial.exists() and load_native(tmp_path / "native").tensors
    lock.release()
    (tmp_path / "hf.incomplete").write_text("mine")
    with pytest.raises(CheckpointError, match=r"hf\.incomplete is in the way: remove it"):
        save_hf(load_hf(model), tmp_path / "hf", checks=QUIET)
    assert (tmp_path / "hf.incomplete").read_text() == "mine"


def test_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at the start; and if others fill it meanwhile, on the way."""
    source = load_hf(model)
    with tmpfs(tmp_path / "disk", 104) as mounted:
        if not mounted:
            pytest.skip("no tmpfs can be mounted here")
        for save in (save_hf, save_native, save_megatron):
            with pytest.raises(CheckpointError, match=r"needs 0.00 GB and .* has 0.00 GB free: make room"):
                save(source, tmp_path / "disk" / "out", checks=QUIET)
            with monkeypatch.context() as patch:
                patch.setattr("megatron_lsh.convert.output._RESERVE", -(10**9))
                with pytest.raises(
                    CheckpointError, match=r"No space left on device.*make room, or give another --save"
                ):
                    save(source, tmp_path / "disk" / "out", checks=QUIET)
            assert contents(tmp_path / "disk") == []


def test_file_size_limit(model: Path, tmp_path: Path) -> None:
    """As a full disk, where no file system can be mounted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for save in (save_hf, save_native, save_megatron):
            with pytest.raises(CheckpointError, match=r"written: (File too large|torch.save failed).*make room"):
                save(load_hf(model), tmp_path / "out", checks=QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == []
