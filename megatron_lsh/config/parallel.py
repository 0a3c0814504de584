"""How the model is cut over ranks, and what each rank computes with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lsh.config.flag import flag

_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
"""powers of two that fp32 has"""


@dataclass
class ParallelConfig:
    """Process groups and devices."""

    tensor_model_parallel_size: int = flag(1, "Ranks that share each dense layer (TP)", at_least=1)
    pipeline_model_parallel_size: int = flag(1, "Pipeline stages, each with its part of the layers (PP)", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None,
        "Interleaved schedule: layers that a rank of a pipeline runs without a step to another rank; fewer than it holds "
        "make the pipeline's bubble smaller, and its traffic larger",
        at_least=1,
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None, "The same by the number of such pieces (default: 1, the plain 1F1B schedule)", at_least=1
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        None, "Layers of the first pipeline stage, where it has not as many as the others", at_least=1
    )
    decoder_last_pipeline_num_layers: int | None = flag(None, "The same of the last one", at_least=1)
    context_parallel_size: int = flag(
        1, "Ranks that share each sequence, and gather keys and values of all of it (CP)", at_least=1
    )
    expert_model_parallel_size: int = flag(1, "Ranks over which the experts are spread (EP)", at_least=1)
    expert_tensor_parallel_size: int | None = flag(
        None, "Ranks that share each expert; only 1 is implemented (default: 1; Megatron: the TP size)", at_least=1
    )
    moe_node_size: int | None = flag(
        None,
        "Ranks per node, in rank order; 1 makes every rank a node (default: what the launcher started)",
        at_least=1,
    )
    sequence_parallel: bool = flag(
        False,
        "Split activations along the sequence outside TP regions; MoE with TP > 1 turns it on (Megatron: an error)",
    )
    use_distributed_optimizer: bool = flag(
        False, "Shard parameters' fp32 copies and optimizer state over data-parallel ranks"
    )
    distributed_backend: str = flag(
        "auto",
        "Backend of the process groups; auto is nccl on GPUs and gloo on CPUs (Megatron: nccl)",
        choices=("auto", "nccl", "gloo"),
    )
    distributed_timeout_minutes: float = flag(10.0, "Time-out of every process group", above=0, at_most=1e6)
    device: str = flag("auto", "Where to train; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    world_size: int | None = flag(
        None, "Ranks assumed by --dry-run (default: the environment's WORLD_SIZE, else 1)", at_least=1
    )


@dataclass
class PrecisionConfig:
    """Arithmetic. Without a flag everything is fp32."""

    bf16: bool = flag(False, "Compute in bf16 with fp32 master weights, fp32 gradient accumulation and reduction")
    fp16: bool = flag(False, "As --bf16 in fp16, whose small gradients need the loss to be scaled up")
    loss_scale: float | None = flag(
        None,
        "Fixed loss scale of --fp16 (default: one that follows the gradients)",
        at_least=_SMALLEST,
        at_most=_LARGEST,
    )
    initial_loss_scale: float = flag(
        2.0**32, "Loss scale of --fp16 to start with", at_least=_SMALLEST, at_most=_LARGEST
    )
    min_loss_scale: float = flag(
        1.0, "Loss scale of --fp16 below which it never falls", at_least=_SMALLEST, at_most=_LARGEST
    )
    loss_scale_window: float = flag(
        1000.0, "Iterations without an overflow after which the loss scale doubles", at_least=1
    )
    hysteresis: int = flag(2, "Iterations with an overflow after which the loss scale halves", at_least=1)

    @property
    def half(self) -> bool:
        """Whether matrices are multiplied in 16 bits."""
        return self.bf16 or self.fp16


@dataclass
class RecomputeConfig:
    """Activation recomputation: trade arithmetic for memory."""

    recompute_activations: bool = flag(False, "Same as --recompute-granularity selective")
    recompute_granularity: str | None = flag(
        None, "full: whole layers; selective: the modules of --recompute-modules", choices=("full", "selective")
    )
    recompute_method: str | None = flag(
        None,
        "Which layers full recomputation covers: uniform (all) or block (the first --recompute-num-layers) "
        "(default: uniform)",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = flag(
        None, "Layers per recomputed chunk (uniform) or number of them (block) (default: 1)", at_least=1
    )
    recompute_modules: list[str] = flag(
        ["core_attn"],
        "Modules that selective recomputation covers",
        choices=("core_attn", "moe", "mlp", "layernorm"),
    )
