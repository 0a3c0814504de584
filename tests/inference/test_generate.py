"""tools/generate.py, and the sampling it shares with the sample at the end of a run."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lsh.checkpoint import CheckpointManager, TrainingState
from megatron_lsh.commands import generate as generate_command
from megatron_lsh.commands import perplexity
from megatron_lsh.config import Config, to_dict
from megatron_lsh.config.checkpoint import CheckpointConfig
from megatron_lsh.data.tokenizers import ByteTokenizer
from megatron_lsh.inference.generate import Sampling, draw, generate, generate_batch
from megatron_lsh.inference.load import settings_of_inference
from megatron_lsh.models.gpt import GPTModel
from megatron_lsh.parallel.context import offline_context
from megatron_lsh.parallel.testing import run_distributed_test
from tests.models.model_helpers import LLAMA_LIKE, MOE, make_config, make_gpt, randomize

CTX = offline_context(device="cpu")
PROMPTS = ["import os", "a", "def f(x):\n    return"]
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def configure() -> Config:
    cfg = make_config(**LLAMA_LIKE, **MOE, seq_length=48, max_position_embeddings=48, vocab_size=257)
    cfg.data.tokenizer_type = "ByteTokenizer"
    cfg.moe.moe_token_dispatcher_type, cfg.lsh.lsh_residual = "lsh", "lowrank"  # generation is exact all the same
    return cfg


def random_model(cfg: Config) -> GPTModel:
    model = make_gpt(cfg, vocab_size=384)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), configure())


def save(folder: Path, cfg: Config) -> Path:
    """Two checkpoints of one random model."""
    model = random_model(settings_of_inference(cfg))
    manager = CheckpointManager(CheckpointConfig(save=str(folder)), CTX, notify=lambda text: None)
    tables = ("embedding.word_embeddings.weight", "output_layer.weight")
    rows = {name: 257 for name, _ in model.named_parameters() if name in tables}
    for iteration in (1, 2):
        state = TrainingState(model, config=to_dict(cfg)["config"], progress={"iteration": iteration}, padded_rows=rows)
        manager.save(state)
    return folder


@torch.no_grad()
def without_cache(model: GPTModel, prompt: list[int], count: int) -> list[int]:
    """The definition: the most probable token after all tokens so far."""
    from megatron_lsh.moe.schedule import exact_dispatch

    tokens = list(prompt)
    with exact_dispatch(model):
        for _ in range(count):
            logits = model(torch.tensor([tokens]))
            assert isinstance(logits, torch.Tensor)
            tokens.append(int(logits[0, -1, :257].argmax()))
    return tokens[len(prompt) :]


def test_a_batch_is_what_each_prompt_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(configure())
    prompts = [ByteTokenizer().tokenize(text) for text in PROMPTS]
    expected = [without_cache(model, prompt, 12) for prompt in prompts]
    for chunk in (256, 5):
        monkeypatch.setattr("megatron_lsh.inference.generate._CHUNK", chunk)
        together = generate_batch(model, prompts, CTX, vocab_size=257, context_length=48, sampling=GREEDY)
        assert together == expected
    # A row ends at its end token, and the others go on.
    eod = expected[0][4]
    ended = generate_batch(model, prompts, CTX, vocab_size=257, context_length=48, sampling=GREEDY, eod=eod)
    assert ended == [row[: row.index(eod)] if eod in row else row for row in expected]
    # Seeds belong to places: the first of a batch draws what it would draw alone.
    drawn = Sampling(max_new_tokens=12, temperature=1.5, top_k=0, top_p=0.9, seed=5)
    alone = generate(model, prompts[0], CTX, vocab_size=257, context_length=48, sampling=drawn)
    assert generate_batch(model, prompts, CTX, vocab_size=257, context_length=48, sampling=drawn)[0] == alone


def test_texts_longer_than_the_context() -> None:
    """When a row is full, it goes on with its last half; rows that are not full do not notice."""
    model = random_model(configure())
    long, short = list(range(60)), [7]
    sampling = Sampling(max_new_tokens=40, temperature=0.0)
    together = generate_batch(model, [long, short], CTX, vocab_size=257, context_length=48, sampling=sampling)
    assert together[1] == without_cache(model, short, 40)
    first = without_cache(model, long[-48:], 1)
    second = without_cache(model, (long + first)[-24:], 5)
    assert together[0][:6] == first + second


def test_every_end_token_ends_a_text() -> None:
    model = random_model(configure())
    prompt = ByteTokenizer().tokenize("import os")
    free = generate(model, prompt, CTX, vocab_size=257, context_length=48, sampling=GREEDY)
    second = free[2]
    ended = generate(model, prompt, CTX, vocab_size=257, context_length=48, eod={256, second}, sampling=GREEDY)
    assert ended == free[: free.index(second)] and len(ended) < len(free)


def test_end_tokens_are_those_of_the_files_too(tmp_path: Path) -> None:
    assert generate_command.end_tokens(tmp_path, ByteTokenizer()) == {256}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert generate_command.end_tokens(tmp_path, ByteTokenizer()) == {0, 1, 3, 256}


def test_draw() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])  # probabilities 0.03, 0.64, 0.24, 0.09

    def drawn(**settings: float) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {draw(logits, Sampling(**{"temperature": 1.0, "top_k": 0, **settings}), generator) for _ in range(200)}  # type: ignore[arg-type]

    assert drawn(temperature=0) == {1}
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.6) == {1}
    assert drawn(top_p=0.65) == {1, 2}
    assert drawn(top_p=0.95) == {1, 2, 3}
    assert drawn(top_p=0.95, top_k=2, temperature=5.0) == {1, 2}
    assert drawn(top_p=1e-9) == {1}
    for temperature in (1e-300, 1e-45, 1e-40, 1e-38, 1e-30):
        assert drawn(temperature=temperature) == drawn(temperature=temperature, top_p=0.9) == {1}


def run_tool(flags: list[str]) -> tuple[int, str]:
    """Exit status and standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = generate_command.main(flags)
    return status, out.getvalue()


def test_the_tool(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank; and two ranks at TP 2 x EP 2 say the same."""
    model, tokenizer = random_model(configure()), ByteTokenizer()
    texts = []
    for text in PROMPTS:
        ids = tokenizer.tokenize(text)
        new = generate(model, ids, CTX, vocab_size=257, context_length=48, eod=256, sampling=GREEDY)
        texts.append(tokenizer.detokenize(ids + new))
    expected = "\n\n".join(texts) + "\n"
    flags = [
        "--load",
        str(checkpoint),
        "--prompt",
        *PROMPTS,
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    assert run_tool(flags) == (0, expected)
    one = [*flags, "--load", str(checkpoint / "iter_0000001")]
    assert run_tool(one) == (0, expected)
    parallel = [*flags, "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    results = run_distributed_test(run_tool, 2, parallel)
    assert results == [(0, expected), (0, "")]

    (tmp_path / "prompts.txt").write_text("a\nb\n")
    status, text = run_tool([*flags[:2], "--prompt-file", str(tmp_path / "prompts.txt"), "--device", "cpu", "--bf16"])
    assert status == 0 and text.startswith("a")
    capsys.readouterr()
    for wrong, message in (
        (flags[:2], "--prompt (absent) must be given"),
        ([*flags, "--top-p", "0"], "--top-p (0) must be above 0 and at most 1: change it"),
        ([*flags, "--temperature", "nan"], "--temperature (nan) must be a finite number: change it"),
        ([*flags, "--seed", "9" * 20], "--seed (99999999999999999999) must be an integer below 2^63: change it"),
        ([*flags, "--ckpt-step", "9"], "has no iteration 9; there are [1, 2]"),
        ([*flags, "--tensor-model-parallel-size", "2"], "must divide the number of ranks"),
        ([*flags, "--load", str(tmp_path)], "holds no native checkpoint: --load takes what --save was"),
        ([*flags, "--load", str(checkpoint.parent)], f"holds no native checkpoint: {checkpoint} does: name that"),
    ):
        assert generate_command.main(wrong) == 1
        assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_on_a_gpu(checkpoint: Path, precision: str) -> None:
    flags = ["--load", str(checkpoint), "--prompt", *PROMPTS, "--max-new-tokens", "12", "--temperature", "0", precision]
    status, text = run_tool([*flags, "--device", "cuda"])
    assert status == 0 and text.startswith(PROMPTS[0]) and PROMPTS[2] in text


def test_printing_keeps_characters_whole(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ByteTokenizer()
    printer = generate_command.Printer(tokenizer, [[97], [98]])
    assert capsys.readouterr().out == "a"
    first, second = "ü".encode()
    printer.token(0, first)
    printer.token(1, 99)
    assert capsys.readouterr().out == "", "half of a character, and a text whose turn has not come"
    printer.token(0, second)
    assert capsys.readouterr().out == "ü"
    printer.token(0, None)
    assert capsys.readouterr().out == "\n\nbc"
    printer.finish()
    assert capsys.readouterr().out == "\n"


def test_perplexity_is_that_of_each_token_from_the_tokens_in_its_window(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against logits of one window per token, at two strides."""
    from megatron_lsh.moe.schedule import exact_dispatch

    text = "import os\n\ndef f(x):\n    return x + 1\n" * 2
    (tmp_path / "text.txt").write_text(text)
    model, ids = random_model(configure()), ByteTokenizer().tokenize(text)
    flags = ["--load", str(checkpoint), "--file", str(tmp_path / "text.txt"), "--device", "cpu", "--json"]
    for stride in (1, 20):
        losses = []
        for place in range(1, len(ids)):
            begin = 0 if place <= 48 else stride * math.ceil((place - 48) / stride)
            with torch.no_grad(), exact_dispatch(model):
                logits = model(torch.tensor([ids[begin:place]]))
            losses.append(-float(logits[0, -1].double().log_softmax(0)[ids[place]]))
        assert perplexity.main([*flags, "--stride", str(stride)]) == 0
        found = json.loads(capsys.readouterr().out)
        mean = sum(losses) / len(losses)
        assert found["tokens"] == len(ids) - 1 and found["loss"] == pytest.approx(mean, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / len(text), rel=1e-5)
    for wrong, message in (
        (["--stride", "49"], "--stride (49) must be at least 1 and at most"),
        (["--file", "/no"], "UTF-8"),
    ):
        assert perplexity.main([*flags, *wrong]) == 1 and message in capsys.readouterr().err


def perplexity_of(flags: list[str]) -> dict[str, float]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert perplexity.main([*flags, "--device", "cpu", "--json"]) == 0
    return json.loads(out.getvalue() or "{}")


def test_a_model_that_was_trained_over_nodes_needs_none(tmp_path: Path) -> None:
    """What the training's ranks were asked for is no part of the model: clusters of a node's rows, pieces, node sizes."""
    cfg = configure()
    cfg.lsh.lsh_residual = "interpolate"
    (tmp_path / "text.txt").write_text("import os\n" * 4)
    found = []
    for name in ("rank", "node"):
        if name == "node":
            cfg.lsh.lsh_scope, cfg.parallel.moe_node_size, cfg.moe.moe_overlap_chunks = "node", 2, 2
            cfg.moe.moe_node_deduplication = "on"
        flags = ["--load", str(save(tmp_path / name, cfg)), "--device", "cpu"]
        found.append((run_tool([*flags, "--prompt", "a", "--temperature", "0", "--max-new-tokens", "5"]),
                      perplexity_of([*flags, "--file", str(tmp_path / "text.txt")])))  # fmt: skip
    assert found[0] == found[1] and found[0][0][0] == 0


def test_ids_in_and_out_with_a_tokenizer_of_numbers(tmp_path: Path) -> None:
    """The checkpoint knows the size of the vocabulary with the end of a document; --vocab-size is one less."""
    cfg = configure()
    cfg.data.tokenizer_type = "NullTokenizer"
    status, out = run_tool(["--load", str(save(tmp_path, cfg)), "--device", "cpu", "--prompt", "1 2 255", *_SHORT])
    assert status == 0 and [word.isdecimal() for word in out.split()[:3]] == [True] * 3


_SHORT = ["--temperature", "0", "--max-new-tokens", "3"]


@pytest.mark.parametrize("kind", [{}, MOE], ids=["dense", "experts"])
def test_perplexity_over_ranks_where_the_context_is_odd(kind: dict[str, Any], tmp_path: Path) -> None:
    """Layers with experts cut the sequence, which is padded then, beyond the table of positions; dense ones alone do not."""
    cfg = make_config(**kind, seq_length=15, max_position_embeddings=15, vocab_size=257)
    assert cfg.model.position_embedding_type == "learned_absolute"
    cfg.data.tokenizer_type = "ByteTokenizer"
    (tmp_path / "text.txt").write_text("import os\n" * 4)
    flags = ["--load", str(save(tmp_path / "run", cfg)), "--file", str(tmp_path / "text.txt")]
    alone = perplexity_of(flags)
    together = run_distributed_test(perplexity_of, 2, [*flags, "--tensor-model-parallel-size", "2"])
    assert together == [pytest.approx(alone, rel=1e-5), {}]
    flags = [*flags[:2], "--prompt", "import os, sys", "--max-new-tokens", "4", "--temperature", "0", "--device", "cpu"]
    found = run_distributed_test(run_tool, 2, [*flags, "--tensor-model-parallel-size", "2"])
    assert found == [run_tool(flags), (0, "")], "generation, at the end of the context"


def test_perplexity_over_ranks_that_share_layers_and_experts(checkpoint: Path, tmp_path: Path) -> None:
    """At TP 2 x EP 2 each rank has half of every sequence, of windows that end in the middle of a text."""
    (tmp_path / "text.txt").write_text("import os\n\ndef f(x):\n    return x + 1\n" * 3)
    flags = ["--load", str(checkpoint), "--file", str(tmp_path / "text.txt"), "--stride", "19"]
    shared = [*flags, "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    alone = perplexity_of(flags)
    assert alone["tokens"] == 113
    assert run_distributed_test(perplexity_of, 2, shared) == [pytest.approx(alone, rel=1e-5), {}]
