"""Convert checkpoints between Hugging Face, this framework and Megatron-LM's legacy format, and dense models to MoE.

    python -m megatron_lsh convert_checkpoint --from hf --to native --load Mixtral-8x7B-v0.1 --save checkpoints/mixtral
    python -m megatron_lsh convert_checkpoint --from native --to hf --load checkpoints/run --save exported
    python -m megatron_lsh convert_checkpoint --from megatron --to native --load megatron/run --save checkpoints/run
    python -m megatron_lsh convert_checkpoint --from hf --to native --load Qwen3-0.6B-Base --save checkpoints/upcycled \\
        --moe-use-upcycling --num-experts 8 --moe-router-topk 2
    python -m megatron_lsh convert_checkpoint --from microsoft --to native --load NAME.pth --save checkpoints/swin

Memory stays near the largest tensor. What was written is read back and compared before it gets its name. See
docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

import torch

from megatron_lsh.config import MoEConfig
from megatron_lsh.config.settings import shown
from megatron_lsh.config.swin import SwinConfig, odd_blocks
from megatron_lsh.config.tool_flags import ToolParser, a_path, integer
from megatron_lsh.convert import (
    CastSource,
    Checks,
    Source,
    load_hf,
    load_megatron,
    load_native,
    save_hf,
    save_megatron,
    save_native,
    upcycle,
    with_reference,
)
from megatron_lsh.convert.swin import (
    is_huggingface_swin,
    load_huggingface,
    load_microsoft,
    load_timm,
    save_huggingface,
)
from megatron_lsh.errors import CheckpointError, exit_status

FORMATS = ("hf", "native", "megatron")
PICTURES = ("microsoft", "timm")
"""formats of Swin alone, to read"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status(lambda: convert(parse(arguments)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="source", choices=(*FORMATS, *PICTURES), required=True, help="format of --load")
    add("--to", dest="target", choices=FORMATS, required=True, help="format of --save")
    add("--load", type=a_path, required=True, help="folder to read")
    add("--save", type=a_path, required=True, help="folder to write; must not hold anything yet")
    add("--verify", action=argparse.BooleanOptionalAction, default=True, help="read back and compare (default: on)")
    add(
        "--logits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --verify, run both models (default: on)",
    )
    add("--dtype", choices=DTYPES, help="type of the written weights (default: as they are)")
    add("--quiet", action="store_true", help="no progress line")
    reading = parser.add_argument_group("reading")
    reading.add_argument("--ckpt-step", type=integer(0), help="iteration to read (default: what the tracker file says)")
    reading.add_argument(
        "--max-position-embeddings", type=integer(1), help="from hf: use the model for shorter contexts only"
    )
    reading.add_argument(
        "--ignore-settings",
        nargs="+",
        default=[],
        metavar="KEY",
        help="from hf or megatron: keys of config.json, or arguments in the file, that are not known here and of which you "
        "know that they change nothing",
    )
    reading.add_argument(
        "--image-size",
        type=integer(1),
        help="from microsoft or timm: side of the pictures (default: what the windows say)",
    )
    reading.add_argument(
        "--vocab-size", type=integer(1), help="from megatron: tokens before padding (default: all rows)"
    )
    writing = parser.add_argument_group("writing")
    writing.add_argument("--model-type", help="to hf: the architecture (default: the one that fits)")
    writing.add_argument("--max-shard-size", type=_bytes, default="5GB", help="to hf: largest file (default: 5GB)")
    writing.add_argument(
        "--reference", type=a_path, help="folder of a Hugging Face model whose tokenizer files to copy"
    )
    writing.add_argument(
        "--target-tensor-parallel-size", type=integer(1), default=1, help="to megatron: TP (default: 1)"
    )
    writing.add_argument(
        "--target-expert-parallel-size", type=integer(1), default=1, help="to megatron: EP (default: 1)"
    )
    writing.add_argument(
        "--spelling",
        choices=("local", "te"),
        default="local",
        help="to megatron: names of SequentialMLP or TransformerEngine",
    )
    moe = parser.add_argument_group("upcycling: a dense model becomes a mixture of experts")
    moe.add_argument("--moe-use-upcycling", action="store_true", help="turn on")
    moe.add_argument(
        "--moe-upcycling-granularity", type=integer(1), default=1, help="experts this many times narrower (default: 1)"
    )
    moe.add_argument("--num-experts", type=integer(1), help="number of experts")
    moe.add_argument("--moe-router-topk", type=integer(1), default=2, help="experts per token (default: 2)")
    moe.add_argument(
        "--moe-layer-freq",
        help="which layers, as in training (default: all; of Swin every second of the last two stages)",
    )
    moe.add_argument("--moe-router-pre-softmax", action="store_true", help="weights that do not add up to one")
    moe.add_argument("--seed", type=integer(), default=1234, help="of the routers' weights (default: 1234)")
    args = parser.parse_args(arguments)
    if not args.moe_use_upcycling and args.num_experts is not None:
        parser.error("--num-experts needs --moe-use-upcycling: an existing model knows its number of experts")
    return args


def convert(args: argparse.Namespace) -> None:
    """Read, change, write. Raises CheckpointError or ConfigError; then nothing is left behind."""
    source: Source = _open(args)
    for notice in getattr(source, "notices", ()):
        print(f"note: {notice}")
    compare = args.load if args.source == "hf" else None
    if args.moe_use_upcycling:
        upcycled = upcycle(source, _experts(source, args), args.moe_upcycling_granularity, args.seed)
        for notice in upcycled.notices:
            print(f"note: {notice}")
            compare = None
        source = upcycled
    if args.dtype is not None:
        source = CastSource(source, DTYPES[args.dtype])
        compare = None
    if args.reference is not None:
        source = with_reference(source, args.reference)
    print(_summary(source))
    if not args.verify:
        print("WARNING: --no-verify: the result is not compared with the source", file=sys.stderr)
    if isinstance(source.cfg, SwinConfig):
        _save_swin(source, args)
        return
    checks = Checks(verify=args.verify, logits=args.logits, logits_with=compare, progress=not args.quiet)
    if args.target == "hf":
        save_hf(source, args.save, model_type=args.model_type, max_shard=args.max_shard_size, checks=checks)
        print(f"saved {args.save}: transformers.AutoModelForCausalLM.from_pretrained reads it")
    elif args.target == "native":
        save_native(source, args.save, checks=checks)
        print(f"saved {args.save}: train with --config {args.save}/release/config.json --load {args.save} ...")
    else:
        tp, ep = args.target_tensor_parallel_size, args.target_expert_parallel_size
        save_megatron(source, args.save, tp=tp, ep=ep, spelling=args.spelling, checks=checks)
        print(
            f"saved {args.save}: load it in Megatron-LM with --ckpt-format torch --load {args.save} --use-checkpoint-args"
        )


def _experts(dense: Source, args: argparse.Namespace) -> MoEConfig:
    """What the flags say of experts, as settings of the dense model's family."""
    moe = type(dense.cfg.moe)(
        num_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
        moe_router_pre_softmax=args.moe_router_pre_softmax,
    )
    usual = odd_blocks(dense.cfg.swin.swin_depths) if isinstance(dense.cfg, SwinConfig) else "1"
    moe.moe_layer_freq = args.moe_layer_freq or usual
    return moe


def _save_swin(source: Source, args: argparse.Namespace) -> None:
    """What of the above a model of pictures has."""
    if args.target == "megatron" or args.reference is not None:
        raise CheckpointError(
            f"{source.what} is a Swin: it is converted to hf (a dense one) and to native, without --reference"
        )
    if args.target == "hf":
        save_huggingface(source, args.save, verify=args.verify)
        print(f"saved {args.save}: transformers.SwinForImageClassification.from_pretrained reads it")
        return
    save_native(source, args.save, checks=Checks(verify=args.verify, logits=False, progress=not args.quiet))
    config = args.save / "release" / "config.json"
    print(
        f"saved {args.save}: train with pretrain_swin_moe.py --config {config} --pretrained-checkpoint {args.save} ..."
    )


def _open(args: argparse.Namespace) -> Source:
    if args.source == "microsoft":
        return load_microsoft(args.load, args.image_size)
    if args.source == "timm":
        return load_timm(args.load, args.image_size)
    if not args.load.is_dir():
        raise CheckpointError(f"--load {args.load} is not a folder: give the one that holds the checkpoint")
    if args.source == "hf" and is_huggingface_swin(args.load):
        return load_huggingface(args.load)
    if args.source == "hf":
        return load_hf(args.load, args.max_position_embeddings, args.ignore_settings)
    if args.source == "native":
        return load_native(args.load, args.ckpt_step)
    return load_megatron(args.load, args.ckpt_step, args.vocab_size, args.ignore_settings)


def _summary(source: Source) -> str:
    cfg = source.cfg
    count = sum(spec.nbytes // spec.dtype.itemsize for spec in source.tensors.values())
    types = sorted({str(spec.dtype).removeprefix("torch.") for spec in source.tensors.values()})
    experts = (
        f", {cfg.moe.num_experts} experts of which {cfg.moe.moe_router_topk} at a time" if cfg.moe.num_experts else ""
    )
    return f"{source.what}: {cfg.model.num_layers} layers{experts}, {count:,} parameters in {', '.join(types)}"


def _bytes(text: str) -> int:
    """``5GB``, ``200MB`` or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d*)?|\.\d+)\s*([KMGT]?)B?", text.strip().upper(), re.ASCII)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2] or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"({shown(text)}) must be a size such as 5GB or 200MB: change it")
    return int(size)
