"""Text to token files, in several processes. ``tools/preprocess_data.py`` is the command line of this module.

Documents are read in the main process in chunks, tokenized by the workers and written in the order of reading, so the
output does not depend on the number of workers. Nothing appears under its final name before all of it is written.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from difflib import get_close_matches
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import numpy as np

from megatron_lsh.config.data import TOKENIZER_TYPES
from megatron_lsh.config.tool_flags import ToolParser, a_name, a_text, integer
from megatron_lsh.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_lsh.data.preparation.encoder import EncodedChunk, EncoderSettings, make_encoder
from megatron_lsh.data.preparation.progress import Progress
from megatron_lsh.data.preparation.sentences import UNITS
from megatron_lsh.data.preparation.sources import TEXT_UNITS, Chunk, Source, open_sources
from megatron_lsh.data.vocabulary import description_path, write_description
from megatron_lsh.errors import ConfigError, DataError, exit_status

MOST_WORKERS = 4096
CHUNKS_AHEAD = 4  # per worker, so that memory stays bounded however large the input


def _start_worker(settings: EncoderSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    make_encoder(settings)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode(settings: EncoderSettings, chunk: Chunk) -> EncodedChunk:
    return make_encoder(settings).encode(chunk)


def _encoded(settings: EncoderSettings, workers: int, sources: list[Source]) -> Iterator[tuple[int, EncodedChunk]]:
    """(number of its source, chunk) for all chunks in the order of reading."""
    chunks = ((number, chunk) for number, source in enumerate(sources) for chunk in source.chunks())
    if workers == 1:
        for number, chunk in chunks:
            yield number, _encode(settings, chunk)
        return
    # spawn, not fork: tokenizer libraries run threads, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (settings,))
    pending: deque[tuple[int, Future[EncodedChunk]]] = deque()
    try:
        for number, chunk in chunks:
            pending.append((number, pool.submit(_encode, settings, chunk)))
            if len(pending) >= workers * CHUNKS_AHEAD:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died (out of memory?): use fewer --workers") from error
    finally:
        # An interrupt in the middle of the pool's own start leaves a thread that cannot be joined yet; it still ends.
        with suppress(RuntimeError):
            pool.shutdown(wait=True, cancel_futures=True)


def preprocess(args: argparse.Namespace) -> list[IndexedDataset]:
    """Tokenize ``--input`` into ``{prefix}_{key}_document.bin/.idx`` for each key; returns the datasets.

    With --split-sentences the files are called ``{prefix}_{key}_sentence`` and a document is as many sequences as it has
    sentences.

    Raises:
        ConfigError, DataError: for bad flags or input; nothing is left behind then.
    """
    settings = EncoderSettings(
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_file,
        args.merge_file,
        args.vocab_size,
        args.vocab_extra_ids,
        tuple(args.json_keys),
        args.append_eod,
        args.split_sentences,
        args.sentence_unit,
        args.lang,
        args.keep_newlines,
    )
    encoder = make_encoder(settings)
    sources = open_sources(
        args.input, args.json_keys, args.input_format, args.text_documents, args.hf_config, args.hf_split
    )
    level = "sentence" if args.split_sentences else "document"
    prefixes = {key: f"{args.output_prefix}_{key}_{level}" for key in args.json_keys}
    before = np.concatenate([[0], np.cumsum([source.size for source in sources])])
    print(
        f"{len(sources)} input(s), {args.workers} worker(s), "
        f"{args.tokenizer_type} with {encoder.tokenizer.vocab_size} ids, stored as {encoder.dtype}"
    )
    progress, empty = Progress(float(before[-1]), args.log_interval), 0
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(prefix, encoder.dtype)) for key, prefix in prefixes.items()
        }
        for number, chunk in _encoded(settings, args.workers, sources):
            for key, column in chunk.columns.items():
                writers[key].add_documents(column.tokens, column.lengths, column.sequences)
            empty += chunk.empty
            progress.update(float(before[number]) + chunk.position, chunk.documents, chunk.size)
        for key, writer in writers.items():
            if not writer.num_documents:
                raise DataError(
                    f"--input {' '.join(args.input)} has no text under the key {key}, and nothing was written: give other "
                    "files, or another of --json-keys"
                )
            description_path(writer.prefix).unlink(missing_ok=True)  # of older data under this name
    datasets = [IndexedDataset(prefix) for prefix in prefixes.values()]
    for dataset in datasets:
        write_description(dataset, encoder.tokenizer, args.tokenizer_model or args.vocab_file, args.split_sentences)
    _summarize(args, datasets, progress, empty)
    return datasets


def _summarize(args: argparse.Namespace, datasets: list[IndexedDataset], progress: Progress, empty: int) -> None:
    seconds = max(progress.seconds, 1e-9)
    print(
        f"100.0% | {progress.documents:,} documents | {progress.size / 1e6:.2f} MB in {seconds:.1f} s | "
        f"{progress.size / 1e6 / seconds:.2f} MB/s | {progress.documents / seconds:,.0f} docs/s"
        + (f" | {empty:,} without text left out" if empty else "")
    )
    for dataset in datasets:
        per_token = f", {progress.size / dataset.num_tokens:.2f} input bytes per token" if len(datasets) == 1 else ""
        print(
            f"{dataset.prefix}.bin, .idx: {dataset.num_documents:,} documents, "
            + (f"{len(dataset):,} sentences, " if args.split_sentences else "")
            + f"{dataset.num_tokens:,} tokens"
            f" ({dataset.dtype}, {dataset.num_tokens * dataset.dtype.itemsize / 1e6:.1f} MB{per_token})"
        )
    model = "".join(
        f" --{name.replace('_', '-')} {getattr(args, name)}"
        for name in ("tokenizer_model", "vocab_file", "merge_file")
        if getattr(args, name)
    )
    print(f"train on it with --data-path {datasets[0].prefix} --tokenizer-type {args.tokenizer_type}{model}")


def make_parser() -> ToolParser:
    """Megatron's flags, and those for inputs other than JSON lines."""
    parser = ToolParser(
        prog="preprocess_data.py",
        description="Tokenize documents into PREFIX_KEY_document.bin and .idx, the files that training reads.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=a_name,
        required=True,
        help="Files, globs or folders of JSON lines (.gz too), text or Parquet; or hf:NAME, a data set of "
        "the Hugging Face datasets package",
    )
    add("--output-prefix", type=a_name, required=True, help="Start of the names of the output files")
    add("--json-keys", nargs="+", type=a_text, default=["text"], help="Keys (columns) to tokenize; one output each")
    add("--append-eod", action="store_true", help="End every document with the end-of-document token")
    add(
        "--input-format",
        choices=("auto", "jsonl", "text", "parquet"),
        default="auto",
        help="Format of all files (auto: by their ending)",
    )
    add(
        "--text-documents",
        choices=TEXT_UNITS,
        default="file",
        help="What a document is in plain text; paragraphs end at a blank line",
    )
    add("--split-sentences", action="store_true", help="Cut documents into sentences, which BERT and T5 need")
    add(
        "--sentence-unit",
        choices=UNITS,
        default="sentence",
        help="What a sentence is: one of the language --lang, a line or a paragraph (for program code, say)",
    )
    add("--lang", default="english", help="Language of the sentences: a name or an ISO 639 code (default: english)")
    add(
        "--keep-newlines",
        action="store_true",
        help="Keep the white space between sentences: put together they are the document",
    )
    add("--hf-config", type=a_name, help="Configuration of a hf: data set")
    add("--hf-split", type=a_name, default="train", help="Split of a hf: data set")
    add("--tokenizer-type", required=True, help=f"One of {', '.join(TOKENIZER_TYPES)}")
    add("--tokenizer-model", type=a_name, help="Tokenizer file, or folder of a Hugging Face tokenizer")
    add("--vocab-file", type=a_name, help="Vocabulary of a BertWordPiece tokenizer, or of GPT2BPETokenizer")
    add("--merge-file", type=a_name, help="Merges of GPT2BPETokenizer")
    add("--vocab-size", type=integer(1), help="Vocabulary of the NullTokenizer")
    add(
        "--vocab-extra-ids",
        type=integer(0),
        default=0,
        help="Sentinel tokens appended to the vocabulary; text has none",
    )
    add(
        "--workers",
        type=integer(1, MOST_WORKERS),
        default=_cpus(),
        help="Processes that tokenize (default: one per usable CPU)",
    )
    add("--log-interval", type=integer(1), default=1000, help="Documents between progress lines")
    unused = parser.add_argument_group("accepted from Megatron-LM command lines, without effect here")
    for name in ("--partitions", "--dataset-impl"):
        unused.add_argument(name, help=argparse.SUPPRESS)
    unused.add_argument("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)
    return parser


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, before any file is touched.

    Raises:
        ConfigError: naming flag, value, rule and fix.
    """
    for name, off in (("keep_newlines", False), ("sentence_unit", UNITS[0])):
        if getattr(args, name) != off and not args.split_sentences:
            raise ConfigError(f"--{name.replace('_', '-')} must not be given without --split-sentences: add that")
    if args.tokenizer_type not in TOKENIZER_TYPES:
        raise ConfigError(
            f"--tokenizer-type ({args.tokenizer_type}) must be one of {', '.join(TOKENIZER_TYPES)}: change it"
        )
    twice = [key for key in args.json_keys if args.json_keys.count(key) > 1]
    if twice:
        raise ConfigError(f"--json-keys names {twice[0]} more than once: name it once")
    ignored = [name for name in ("partitions", "dataset_impl", "keep_sequential_samples") if getattr(args, name)]
    if ignored:
        print(f"no effect here: {', '.join('--' + name.replace('_', '-') for name in ignored)}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = make_parser()

    def work() -> None:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            near = get_close_matches(unknown[0], flags, 1)
            parser.error(f"unknown argument {unknown[0]}{f': did you mean {near[0]}?' if near else ''}")
        check_flags(args)
        preprocess(args)

    return exit_status(work)
