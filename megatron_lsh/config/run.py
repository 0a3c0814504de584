"""Data, checkpoints and logging: everything about a run that is not arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.flag import flag

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "ByteTokenizer",
    "NullTokenizer",
)


def _split_text(value: Any) -> Any:
    """YAML may hold a list where the command line has ``969,30,1``; scripts of Megatron-LM's quote it twice."""
    return (
        ",".join(map(str, value))
        if isinstance(value, list)
        else value.strip("'\"")
        if isinstance(value, str)
        else value
    )


@dataclass
class DataConfig:
    """Data sets and tokenizer."""

    data_path: list[str] | None = flag(None, "PREFIX, or W1 PREFIX1 W2 PREFIX2 ... for a blend")
    train_data_path: list[str] | None = flag(None, "As --data-path, for training only")
    valid_data_path: list[str] | None = flag(None, "As --data-path, for validation only")
    test_data_path: list[str] | None = flag(None, "As --data-path, for the final test only")
    split: str | None = flag(
        None, "Shares of train, valid and test documents of --data-path (default: 969,30,1)", parse=_split_text
    )
    data_cache_path: str | None = flag(None, "Where index files are cached (default: beside the data)")
    mock_data: bool = flag(False, "Train on synthetic tokens; no files needed")
    num_workers: int = flag(2, "Data-loading threads per rank; 0 loads in the training thread", at_least=0)
    eod_mask_loss: bool = flag(False, "No loss on end-of-document tokens")
    reset_position_ids: bool = flag(False, "Restart positions after an end-of-document token")
    reset_attention_mask: bool = flag(False, "No attention across end-of-document tokens")
    tokenizer_type: str | None = flag(
        None,
        "Kind of tokenizer (default with --vocab-file: GPT2BPETokenizer, for BERT and T5 BertWordPieceLowerCase)",
        choices=TOKENIZER_TYPES,
    )
    tokenizer_model: str | None = flag(None, "Tokenizer file, or folder of a Hugging Face tokenizer")
    vocab_file: str | None = flag(
        None,
        "Vocabulary of a BertWordPiece tokenizer, one token per line (vocab.txt), or of GPT2BPETokenizer (vocab.json)",
    )
    merge_file: str | None = flag(None, "Merges of GPT2BPETokenizer, one pair per line (merges.txt)")
    vocab_extra_ids: int = flag(
        0, "Sentinel tokens <extra_id_0>, ... of T5, appended to the vocabulary unless it has them", at_least=0
    )


@dataclass
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = flag(None, "Folder to save checkpoints in")
    load: str | None = flag(None, "Folder to resume from; without a checkpoint in it, training starts afresh")
    save_interval: int | None = flag(None, "Iterations between checkpoints (absent: only at the end)", at_least=1)
    save_retain_interval: int | None = flag(
        None, "Keep only the newest checkpoint and every multiple of this", at_least=1
    )
    save_optim: bool = flag(True, "Saving of the optimizer state", off="--no-save-optim")
    save_rng: bool = flag(True, "Saving of the random number generators' state", off="--no-save-rng")
    load_optim: bool = flag(True, "Loading of the optimizer state", off="--no-load-optim")
    load_rng: bool = flag(True, "Loading of the random number generators' state", off="--no-load-rng")
    finetune: bool = flag(False, "Load weights only: iteration, optimizer and RNG start afresh")
    pretrained_checkpoint: str | None = flag(None, "Folder with weights to start from when --load has no checkpoint")
    use_checkpoint_args: bool = flag(
        False,
        "Take the model's shape and its tokenizer from the checkpoint in --load or --pretrained-checkpoint, if there is one",
    )
    ckpt_step: int | None = flag(None, "Load this iteration instead of the newest", at_least=0)
    exit_on_missing_checkpoint: bool = flag(False, "Exit when --load has no checkpoint")
    ckpt_format: str = flag(
        "torch_dist",
        "Format of the checkpoint; there is one, that of PyTorch's distributed checkpoints, whichever name is given",
        choices=("torch_dist", "torch_dcp", "torch", "fsdp_dtensor"),
    )
    auto_detect_ckpt_format: bool = flag(False, "Accepted for compatibility: the format is always detected")
    async_save: bool = flag(False, "Write checkpoints in a background thread")
    moe_use_upcycling: bool = flag(
        False,
        "Start from a dense checkpoint (--load, or --pretrained-checkpoint when --load has none): convert it to this MoE "
        "model in --save, and train that",
    )
    moe_upcycling_granularity: int = flag(
        1, "How many times narrower an upcycled expert is than the dense feed-forward layer", at_least=1
    )


@dataclass
class LoggingConfig:
    """What is reported, where and how often."""

    log_interval: int = flag(100, "Iterations between log lines", at_least=1)
    tensorboard_dir: str | None = flag(None, "Folder for TensorBoard files")
    tensorboard_log_interval: int = flag(1, "Iterations between TensorBoard points", at_least=1)
    tensorboard_queue_size: int = flag(1000, "TensorBoard's write queue", at_least=1)
    metrics_jsonl: str | None = flag(None, "Append one JSON object per logged iteration and evaluation to this file")
    log_throughput: bool = flag(False, "Print TFLOP/s per GPU in the log line")
    log_params_norm: bool = flag(False, "Log the norm of the parameters")
    log_validation_ppl_to_tensorboard: bool = flag(False, "Write validation perplexity to TensorBoard")
    log_progress: bool = flag(False, "Append one line per checkpoint to SAVE/progress.txt")
    progress: bool = flag(True, "Progress with percent, tokens/s and ETA after each log line", off="--no-progress")
    print_full_config: bool = flag(
        False, "Print every setting at start-up, not only those that differ from the default"
    )
    sample_prompt: str | None = flag(None, "Text for the model to continue when training ends, printed as a sample")
    sample_tokens: int = flag(120, "Length of the sample in tokens", at_least=1)
    profile: bool = flag(False, "Trace iterations --profile-step-start to --profile-step-end with torch.profiler")
    profile_step_start: int = flag(10, "First profiled iteration", at_least=0)
    profile_step_end: int = flag(12, "Iteration at which profiling ends", at_least=1)
    profile_ranks: list[int] = flag([0], "Ranks that profile", at_least=0)
    peak_tflops: float | None = flag(
        None, "Peak of one device in TFLOP/s, the base of MFU (default: known GPUs; measured on CPU)", above=0
    )
