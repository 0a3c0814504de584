from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lsh.data.tokenizers.wordpiece import train_wordpiece
from tests.data.helpers import load_tool, numbered_sentences, write_sentences

TEXTS = [
    "def f(x):\n        return x + 1  # add one\n\n\n",
    'class A:\n    """Doc string."""\n\n    def __init__(self):\n        self.x = [1, 2, 345]\n',
    "import os\nfor name in os.listdir('.'):\n\tprint(name, end=' ')\r\n",
    "   leading and trailing spaces   \n" * 3,
] * 5


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 320 pieces: <unk> 0, <s> 1, </s> 2, <pad> 3, the bytes, and some words."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(load_tool("prepare_stdlib_corpus").train_tokenizer(TEXTS, 320, 10**6))
    return path


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cased WordPiece vocabulary of at most 200 tokens: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then pieces."""
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_text(train_wordpiece([*TEXTS, "Some words, and other words."], 200), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json of 300 tokens, the last of them <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def gpt2_files(huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """vocab.json (<|endoftext|> is 299) and merges.txt of the same tokens, by the names of their settings."""
    model = json.loads((huggingface_folder / "tokenizer.json").read_text())["model"]
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 299}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    return {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """100 documents of 6 sentences of 7 tokens; each token is its own position."""
    write_sentences(tmp_path / "corpus", numbered_sentences([[7] * 6] * 100))
    return str(tmp_path / "corpus")
