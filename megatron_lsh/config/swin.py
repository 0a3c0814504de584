"""Settings that only Swin and Swin-MoE have: pictures, stages, windows.

Liu et al., arXiv:2103.14030 (Swin); Hwang et al., arXiv:2206.03382 (Swin-MoE, in section 5 of Tutel's paper).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_lsh.config.checker import Checker
from megatron_lsh.config.config import Config
from megatron_lsh.config.flag import flag
from megatron_lsh.config.images import ImageSettings, check_images
from megatron_lsh.config.model import MOST_LAYERS, ModelConfig
from megatron_lsh.config.moe import MoEConfig
from megatron_lsh.config.swin_presets import PRESETS

ODD = "odd"
"""--moe-layer-freq of the published models"""
LARGEST_SIDE = 65_536
"""of a picture, and largest number of pixels of a patch's or window's side"""


@dataclass
class SwinModelConfig(ModelConfig):
    """Architecture of the blocks. Sizes are those of the first stage; each further stage is twice as wide."""

    hidden_size: int | None = flag(96, "Width D of the first stage", at_least=1)
    ffn_hidden_size: int | None = flag(None, "Width F of the first stage's feed-forward layers", at_least=1)
    num_attention_heads: int | None = flag(
        None, "Attention heads of the first stage (default: one per 32 channels)", at_least=1
    )
    position_embedding_type: str = flag(
        "none", "Kind of position embedding: none, because attention has --swin-position-bias", choices=("none",)
    )
    attention_dropout: float = flag(0.0, "Dropout on attention probabilities", at_least=0, below=1)
    hidden_dropout: float = flag(0.0, "Dropout on the residual branches and the patches", at_least=0, below=1)
    scaled_init: bool = flag(
        False, "Divide the initial weights that write to the residual stream by sqrt(2 x blocks of the stage)"
    )


@dataclass
class SwinMoEConfig(MoEConfig):
    """Router, experts and dispatcher. Width F of an expert is that of the first stage, and doubles with the stages."""

    moe_layer_freq: str = flag(
        ODD,
        "Which blocks are MoE: odd (every second block of the last two stages, as published), an integer n (every n-th), "
        "or a list over the blocks of all stages such as ([0]*4+[1]*8)",
        parse=str,
    )
    moe_router_topk: int = flag(1, "Experts per token, K", at_least=1)
    moe_router_pre_softmax: bool = flag(
        False, "Softmax before the top-k instead of after it; always so with softmax scores and one expert per token"
    )
    moe_router_bias: bool = flag(False, "Bias of the router")
    eval_capacity: bool = flag(False, "Drop what is beyond --moe-expert-capacity-factor in evaluations too")


@dataclass
class SwinSettings:
    """Pictures, stages and windows of Swin. Names are Megatron-LM's where it has them."""

    preset: str | None = flag(
        None, "A published model, whose settings hold where no other flag says otherwise", choices=tuple(PRESETS)
    )
    img_h: int = flag(224, "Height of the pictures that the model sees", at_least=1, at_most=LARGEST_SIDE)
    img_w: int | None = flag(None, "Width of the pictures (default: --img-h)", at_least=1, at_most=LARGEST_SIDE)
    patch_dim: int = flag(4, "Side of a patch, in pixels (Megatron: 16)", at_least=1, at_most=LARGEST_SIDE)
    num_channels: int = flag(3, "Channels of a picture: 3, or 1 for shades of grey", at_least=1, at_most=3)
    num_classes: int | None = flag(
        None, "Number of classes (default: those of the training data; Megatron: 1000)", at_least=2, at_most=10_000_000
    )
    swin_depths: list[int] = flag([2, 2, 6, 2], "Blocks of each stage", at_least=1, at_most=MOST_LAYERS)
    swin_num_heads: list[int] | None = flag(
        None, "Attention heads of each stage (default: --num-attention-heads, doubled with each stage)", at_least=1
    )
    swin_window_size: int = flag(7, "Side of a window, in patches", at_least=1, at_most=LARGEST_SIDE)
    swin_pretrained_window_size: list[int] | None = flag(
        None,
        "Sides of the windows with which the mlp of position biases was trained, one or one per stage (default: those of "
        "this run)",
        at_least=1,
        at_most=LARGEST_SIDE,
    )
    swin_position_bias: str = flag(
        "mlp",
        "Where the biases of relative positions come from: a small network of the distance (Swin-MoE), or a table (Swin)",
        choices=("mlp", "table"),
    )
    drop_path_rate: float = flag(
        0.1,
        "Share of the samples that skip a branch of the last block; it grows from 0 in the first",
        at_least=0,
        below=1,
    )
    freeze_experts: bool = flag(
        False, "Leave the experts and routers as they were loaded, as Tutel's authors fine-tune"
    )


@dataclass
class SwinConfig(Config):
    """The configuration of ``pretrain_swin_moe.py``.

    ``examples`` is no setting: the number of training pictures, which is known when the data has been read.
    """

    indexed_data: ClassVar[bool] = False
    tokenized: ClassVar[bool] = False
    default_tokenizer: ClassVar[str | None] = None
    why_no_sample: ClassVar[str | None] = "only a GPT continues a text"
    why_no_pipeline: ClassVar[str | None] = (
        "pipeline parallelism is not implemented for Swin, whose hidden states change their shape on the way"
    )

    why_no_context_parallel: ClassVar[str | None] = (
        "context parallelism is not implemented for Swin, which attends within windows of a picture"
    )

    model: SwinModelConfig = field(default_factory=SwinModelConfig)
    moe: SwinMoEConfig = field(default_factory=SwinMoEConfig)
    swin: SwinSettings = field(default_factory=SwinSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    examples: int | None = field(default=None, repr=False, compare=False)

    @classmethod
    def preset(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return PRESETS.get(str(values.get("preset")), {})

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.swin.img_h, self.swin.img_w or self.swin.img_h

    def heads(self) -> list[int]:
        """Of each stage."""
        first = self.model.num_attention_heads or 1
        return self.swin.swin_num_heads or [first << stage for stage in range(len(self.swin.swin_depths))]

    def pretrained_window_side(self, stage: int) -> int | None:
        """See --swin-pretrained-window-size; None where that is the side of this run's windows."""
        sides = self.swin.swin_pretrained_window_size
        return None if sides is None else sides[stage % len(sides)]

    def layers_of_stacks(self) -> list[int]:
        return list(self.swin.swin_depths)

    def derive_own(self, check: Checker, world_size: int) -> None:
        super().derive_own(check, world_size)
        swin, model = self.swin, self.model
        if swin.img_w is None:
            check.fill("img_w", swin.img_h)
        if model.num_layers is None:
            check.fill("num_layers", sum(swin.swin_depths))
        if model.num_attention_heads is None and model.hidden_size is not None:
            check.fill("num_attention_heads", (swin.swin_num_heads or [max(model.hidden_size // 32, 1)])[0])
        if model.seq_length is None:
            check.fill("seq_length", self._patches())
        if self.moe.moe_router_topk == 1 and self.moe.moe_router_score_function == "softmax":
            check.fill("moe_router_pre_softmax", True)
        if self.moe.moe_layer_freq == ODD:
            check.fill("moe_layer_freq", odd_blocks(swin.swin_depths))
        if self.training.train_iters is None and self.training.train_samples is None and self.images.epochs is not None:
            examples = self.examples if self.examples is not None else (1 << 40)  # before the data has been read
            check.fill("train_samples", examples * self.images.epochs)

    def check_own(self, check: Checker) -> None:
        super().check_own(check)
        swin = self.swin
        blocks = sum(swin.swin_depths)
        check.rule(
            f"{{num_layers}} must be {blocks}, the sum of {{swin_depths}}",
            lambda layers, depths: layers == sum(depths),
            "drop --num-layers",
        )
        check.rule(
            "{seq_length} must be the number of patches", lambda length: length == self._patches(), "drop --seq-length"
        )
        check.rule(
            "{swin_num_heads} must be one number for each of the stages in {swin_depths}",
            lambda heads, depths: len(heads) == len(depths),
        )
        check.rule(
            "{swin_num_heads} must begin with {num_attention_heads}",
            lambda heads, first: heads[0] == first,
            "drop --num-attention-heads",
        )
        check.rule(
            "{hidden_size} must be divisible by {swin_num_heads} in every stage, where the width is doubled with each",
            lambda width, heads: all((width << stage) % count == 0 for stage, count in enumerate(heads)),
        )
        check.rule(
            "{swin_pretrained_window_size} must be one number, or one for each of the stages in {swin_depths}",
            lambda sides, depths: len(sides) in (1, len(depths)),
        )
        check.rule("{num_channels} must be 1 or 3", lambda channels: channels != 2)
        check.rule(
            "{tensor_model_parallel_size} must be 1 with Swin, whose first stages have few heads",
            lambda size: size == 1,
            "use --expert-model-parallel-size",
        )
        check.rule("{kv_channels} must not be given", lambda _: "kv_channels" in self.derived, "drop --kv-channels")
        check.rule("{group_query_attention} must be off with Swin", lambda on: not on, "drop --group-query-attention")
        check.rule(
            "{moe_use_upcycling} must be off with Swin", lambda on: not on, "upcycle with tools/convert_checkpoint.py"
        )
        check.rule(
            "{freeze_experts} must be off without experts",
            lambda on: not on or self.moe.num_experts is not None,
            "set --num-experts or drop it",
        )
        check.rule(
            "{swin_pretrained_window_size} must not be given with {swin_position_bias}",
            lambda _, kind: kind == "mlp",
            "drop it: a table holds one bias per distance, and has no window that it was scaled by",
        )
        check_images(self, check)

    def _patches(self) -> int:
        height, width = self.image_size
        return -(-height // self.swin.patch_dim) * -(-width // self.swin.patch_dim)


def odd_blocks(depths: list[int]) -> str:
    """The --moe-layer-freq that makes blocks 1, 3, ... of the last two stages mixtures of experts."""
    last = len(depths) - 2
    pattern = [int(stage >= last and block % 2 == 1) for stage, depth in enumerate(depths) for block in range(depth)]
    return "[" + ",".join(map(str, pattern)) + "]"
