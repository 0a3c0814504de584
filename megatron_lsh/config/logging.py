"""What is reported of a run, where and how often."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lsh.config.flag import flag


@dataclass
class LoggingConfig:
    """What is reported, where and how often."""

    log_interval: int = flag(100, "Iterations between log lines", at_least=1)
    tensorboard_dir: str | None = flag(None, "Folder for TensorBoard files")
    tensorboard_log_interval: int = flag(1, "Iterations between TensorBoard points", at_least=1)
    tensorboard_queue_size: int = flag(1000, "TensorBoard's write queue", at_least=1)
    wandb_project: str | None = flag(
        None, "Weights & Biases project to write to, what TensorBoard shows; WANDB_MODE=offline needs no network"
    )
    wandb_exp_name: str | None = flag(None, "Name of the run in Weights & Biases (default: one that it makes up)")
    wandb_save_dir: str | None = flag(
        None,
        "Folder of Weights & Biases' files and of the run's id, by which a resumed run continues it (default: SAVE/wandb)",
    )
    wandb_entity: str | None = flag(None, "User or team of --wandb-project")
    metrics_writers: list[str] = flag(
        [], "Further writers of the same figures: names of entry points megatron_lsh.writers of installed packages"
    )
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
    flight_recorder_dump_path: str | None = flag(
        None,
        "Folder for the last collectives of each rank, written when a rank is lost or hangs (torch's flight recorder)",
    )
    flight_recorder_trace_buffer_size: int = flag(
        2000, "Collectives that --flight-recorder-dump-path remembers", at_least=1
    )
    record_memory_history: bool = flag(
        False, "Remember a GPU's allocations for --memory-snapshot-path, which implies it"
    )
    memory_snapshot_path: str | None = flag(
        None,
        "File for a GPU's allocations, with the rank in its name, written when memory runs out and at the end (default: "
        "snapshot.pickle)",
    )
    peak_tflops: float | None = flag(
        None, "Peak of one device in TFLOP/s, the base of MFU (default: known GPUs; measured on CPU)", above=0
    )
