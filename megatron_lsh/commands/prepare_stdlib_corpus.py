"""A corpus without a download: the Python standard library's own sources, and tokenizers trained on them.

Writes into --output-dir

    stdlib.jsonl       one {"text": ..., "path": ...} per source file, in an order that depends on the file names alone
    tokenizer.model    SentencePiece model (BPE) that reproduces every byte of them: no normalization, line breaks and
                       indentation are part of the pieces, and bytes stand in for rare characters
    vocab.txt          WordPiece vocabulary (cased) for BERT, which does without white space
    stdlib.json        what they were made of; a second run with the same inputs does nothing

Next: python -m megatron_lsh preprocess_data --input DIR/stdlib.jsonl --tokenizer-type GPTSentencePieceTokenizer ... (see
scripts/prepare_readme_data.sh)
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_lsh.config.tool_flags import ToolParser, a_path, integer, real
from megatron_lsh.data.preparation.progress import Progress
from megatron_lsh.data.preparation.recipe import is_up_to_date, record_of
from megatron_lsh.data.tokenizers.wordpiece import train_wordpiece
from megatron_lsh.errors import ConfigError, DataError, exit_status

FORMAT = 2  # raise it when the output for the same arguments changes
MOST_MB = 1e6
SENTENCE_BYTES = 4000  # the trainer sees files in pieces of whole lines of about this size
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this; it cannot keep the two apart


def source_files(root: Path) -> list[Path]:
    """Python files of a standard library, in an order that looks random and is the same everywhere.

    The order matters: the documents at the end become the validation set, which should resemble the rest.
    """
    found = [
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
    ]
    return sorted(found, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def read_documents(root: Path, limit: int) -> tuple[list[dict[str, str]], int]:
    """({"text", "path"} of the first files up to ``limit`` bytes in all, number of files left out).

    Left out are empty files, those that are not UTF-8 (some tests are so on purpose) and those SentencePiece cannot
    reproduce.
    """
    files = source_files(root)
    progress = Progress(len(files), 500)
    documents: list[dict[str, str]] = []
    total = left_out = 0
    for number, path in enumerate(files, start=1):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text.strip() or SPACE_MARK in text:
            left_out += 1
            continue
        if total + len(content) > limit:
            break
        total += len(content)
        documents.append({"text": text, "path": path.relative_to(root).as_posix()})
        progress.update(max(number / len(files), total / limit) * len(files), 1, len(content))
    return documents, left_out


def sentences(texts: list[str], limit: int) -> Iterator[str]:
    """Pieces of whole lines, up to ``limit`` bytes in all."""
    total = 0
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > SENTENCE_BYTES:
                yield piece
                piece = ""
            piece += line
        if piece:
            yield piece
        total += len(text.encode())
        if total >= limit:
            return


def train_tokenizer(texts: list[str], vocab_size: int, limit: int) -> bytes:
    """A SentencePiece BPE model that decodes what it encodes to the same text.

    Raises:
        ConfigError: if the text is too small for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts, limit),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 22,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--vocab-size ({vocab_size}) does not suit the text ({error}): choose another, or raise --tokenizer-mb"
        ) from error
    return model.getvalue()


def check_round_trip(model: bytes, texts: list[str]) -> None:
    """Raises DataError if a text does not come back from the tokenizer as it went in."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    for text in texts:
        if processor.decode(processor.encode(text)) != text:
            raise DataError(
                f"the tokenizer does not reproduce the text that begins with {text[:60]!r}: please report this"
            )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either complete or not there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written ({error}): free some space or choose another --output-dir"
        ) from error


def prepare(args: argparse.Namespace) -> None:
    """Write the corpus and the tokenizers, unless they are there."""
    begin = time.monotonic()
    root: Path = args.stdlib or Path(sysconfig.get_paths()["stdlib"])
    folder: Path = args.output_dir
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder: this interpreter's standard library is not kept as files; give --stdlib"
        )
    recipe = {
        "format": FORMAT,
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "tokenizers": tokenizers.__version__,
        "max_mb": args.max_mb,
        "vocab_size": args.vocab_size,
        "tokenizer_mb": args.tokenizer_mb,
    }
    recipe |= {"stdlib": str(root)} if args.stdlib else {}
    corpus, record = folder / "stdlib.jsonl", folder / "stdlib.json"
    model_file, vocab_file = folder / "tokenizer.model", folder / "vocab.txt"
    if not args.force and is_up_to_date(record, recipe, (corpus, model_file, vocab_file)):
        print(f"{corpus}, {model_file} and {vocab_file} are up to date (--force makes them again)")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # what it vouches for is about to change
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}): choose another --output-dir") from error
    documents, left_out = read_documents(root, int(args.max_mb * 1e6))
    if not documents:
        raise DataError(
            f"{root} has no Python sources that fit in --max-mb {args.max_mb}: give --stdlib or raise --max-mb"
        )
    texts = [document["text"] for document in documents]
    size = sum(len(text.encode()) for text in texts)
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    write_whole(corpus, lines.encode())
    print(
        f"{corpus}: {len(documents):,} documents, {size / 1e6:.1f} MB of Python {recipe['python']} "
        f"({left_out} files left out)"
    )
    print(
        f"training tokenizers of {args.vocab_size:,} pieces on {min(args.tokenizer_mb, size / 1e6):.1f} MB ...",
        flush=True,
    )
    model = train_tokenizer(texts, args.vocab_size, int(args.tokenizer_mb * 1e6))
    check_round_trip(model, texts[:: max(1, len(texts) // 50)])
    write_whole(model_file, model)
    print(f"{model_file}: {len(model) / 1e3:.0f} kB, reproduces the text exactly")
    vocabulary = train_wordpiece(sentences(texts, int(args.tokenizer_mb * 1e6)), args.vocab_size)
    write_whole(vocab_file, vocabulary.encode())
    count = vocabulary.count("\n")
    print(f"{vocab_file}: {count:,} WordPieces, for BertWordPieceCase; {time.monotonic() - begin:.1f} s in all")
    write_whole(record, record_of(recipe).encode())


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = ToolParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output-dir", type=a_path, default=Path("data"), help="Folder of the results (default: data)")
    parser.add_argument(
        "--max-mb",
        type=real(above=0, at_most=MOST_MB),
        default=12.0,
        help="Size of the corpus in MB of source text (default: 12; the whole library has about 30)",
    )
    parser.add_argument(
        "--vocab-size", type=integer(1, 2**31 - 1), default=4096, help="Pieces of each tokenizer (default: 4096)"
    )
    parser.add_argument(
        "--tokenizer-mb",
        type=real(above=0, at_most=MOST_MB),
        default=6.0,
        help="MB of the corpus to train the tokenizers on (default: 6)",
    )
    parser.add_argument("--stdlib", type=a_path, help="Folder of the sources (default: the running interpreter's)")
    parser.add_argument("--force", action="store_true", help="Make everything again")
    return exit_status(lambda: prepare(parser.parse_args(words)), "not all files were written, run it again")
