"""The training run: batch sizes, length, optimizer, schedules, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lsh.config.flag import flag


def _signal_name(value: Any) -> Any:
    """``usr1`` is SIGUSR1."""
    if not isinstance(value, str):
        return value
    return value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"


@dataclass
class TrainingConfig:
    """Length and batch of the run, evaluation and exits."""

    micro_batch_size: int | None = flag(None, "Sequences per rank and forward pass", at_least=1)
    global_batch_size: int | None = flag(
        None, "Sequences per iteration over all ranks (default: micro batch x DP)", at_least=1
    )
    train_iters: int | None = flag(None, "Iterations to train; or give --train-samples", at_least=1)
    train_samples: int | None = flag(None, "Sequences to train on; or give --train-iters", at_least=1)
    calculate_per_token_loss: bool = flag(
        False,
        "Give every token with a loss the same weight in the gradient, over the whole global batch, instead of every "
        "micro-batch",
    )
    seed: int = flag(1234, "Seed of weights, data order and dropout", at_least=0)
    exit_interval: int | None = flag(None, "Save and exit when the iteration is a multiple of this", at_least=1)
    exit_duration_in_mins: float | None = flag(None, "Save and exit after this many minutes", above=0)
    exit_signal_handler: bool = flag(
        False, "Accepted for compatibility: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 always save and exit"
    )
    exit_signal: str | None = flag(
        None,
        "A signal that saves and exits even if the process was started to ignore it, as SIGHUP under nohup",
        choices=("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"),
        parse=_signal_name,
    )
    max_consecutive_nan_iterations: int = flag(
        5, "Stop after this many iterations in a row with a non-finite loss or gradient", at_least=1
    )
    eval_iters: int = flag(100, "Global batches per evaluation", at_least=0)
    eval_interval: int | None = flag(None, "Iterations between evaluations (absent: only at the end)", at_least=1)
    skip_train: bool = flag(False, "Only evaluate")
    dry_run: bool = flag(False, "Print layout, parameter counts and a memory estimate for --world-size ranks, and exit")
    dry_run_json: bool = flag(False, "With --dry-run, print its figures as one JSON object instead of text")
    deterministic_mode: bool = flag(False, "Use deterministic algorithms only")


@dataclass
class OptimizerConfig:
    """Optimizer, its schedule and regularization."""

    optimizer: str = flag(
        "adam",
        "adam is AdamW; muon is Muon for the matrices of hidden layers, and AdamW for the rest",
        choices=("adam", "sgd", "muon"),
        parse=lambda name: "muon" if name == "dist_muon" else name,  # Megatron-LM's word for muon with sharded state
    )
    muon_momentum: float = flag(0.95, "Momentum of --optimizer muon", at_least=0, below=1)
    muon_nesterov: bool = flag(False, "Nesterov's momentum in --optimizer muon")
    muon_scale_mode: str = flag(
        "spectral",
        "Scale of the update of a matrix [R, D]: the root of max(R, D), of R / D, or of max(1, R / D)",
        choices=("spectral", "unit_rms_norm", "shape_scaling"),
    )
    muon_extra_scale_factor: float = flag(
        1.0, "Further factor of Muon's updates; with spectral, 0.2 makes them as large as AdamW's", above=0
    )
    muon_num_ns_steps: int = flag(5, "Newton-Schulz iterations that make an update orthogonal", at_least=1)
    use_apex_adam: bool = flag(False, "Use NVIDIA apex's FusedAdam; an error if the real one is not installed")
    lr: float | None = flag(None, "Peak learning rate", at_least=0)
    min_lr: float = flag(0.0, "Floor of the learning rate", at_least=0)
    decoupled_lr: float | None = flag(
        None, "Peak learning rate of the word embeddings and the output layer (default: --lr)", at_least=0
    )
    decoupled_min_lr: float | None = flag(None, "Floor of --decoupled-lr (default: --min-lr)", at_least=0)
    lr_decay_style: str = flag(
        "linear", "Shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = flag(None, "Iterations over which to decay (default: --train-iters)", at_least=1)
    lr_decay_samples: int | None = flag(None, "Samples over which to decay (default: --train-samples)", at_least=1)
    lr_warmup_iters: int = flag(0, "Iterations of linear warm-up", at_least=0)
    lr_warmup_fraction: float | None = flag(
        None, "Warm-up as a share of the decay iterations (or samples)", at_least=0, below=1
    )
    lr_warmup_samples: int = flag(0, "Samples of linear warm-up", at_least=0)
    lr_warmup_init: float = flag(0.0, "Learning rate at the start of the warm-up", at_least=0)
    lr_wsd_decay_style: str = flag(
        "exponential", "Shape of the final decay of WSD", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = flag(None, "Iterations of the final decay of WSD", at_least=1)
    lr_wsd_decay_samples: int | None = flag(None, "Samples of the final decay of WSD", at_least=1)
    override_opt_param_scheduler: bool = flag(
        False, "On resume, take the schedule from the command line", aliases=("--override-opt_param-scheduler",)
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "On resume, take the schedule from the checkpoint", aliases=("--use-checkpoint-opt_param-scheduler",)
    )
    weight_decay: float = flag(0.01, "Decoupled weight decay (not on biases and norms)", at_least=0)
    start_weight_decay: float | None = flag(None, "Weight decay at the start (default: --weight-decay)", at_least=0)
    end_weight_decay: float | None = flag(None, "Weight decay at the end (default: --weight-decay)", at_least=0)
    weight_decay_incr_style: str = flag(
        "constant", "How the weight decay moves from start to end", choices=("constant", "linear", "cosine")
    )
    adam_beta1: float = flag(0.9, "Adam's first beta", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "Adam's second beta", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "Adam's epsilon", above=0)
    sgd_momentum: float = flag(0.9, "Momentum of --optimizer sgd", at_least=0, below=1)
    clip_grad: float = flag(1.0, "Clip the global gradient norm at this (0: never)", at_least=0)
