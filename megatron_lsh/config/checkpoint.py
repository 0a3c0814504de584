"""Saving and loading of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lsh.config.flag import flag


@dataclass
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = flag(None, "Folder to save checkpoints in")
    load: str | None = flag(None, "Folder to resume from; without a checkpoint in it, training starts afresh")
    save_interval: int | None = flag(None, "Iterations between checkpoints (absent: only at the end)", at_least=1)
    save_retain_interval: int | None = flag(
        None,
        "Keep only the newest checkpoint and every multiple of this; the one before it stays until a step is done with it",
        at_least=1,
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
