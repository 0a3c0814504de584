"""One MoE layer of several frameworks, forward and backward, on the same ranks behind the same links.

    pip install --no-deps megatron-core fairscale deepspeed accelerate psutil hjson py-cpuinfo msgpack einops
    sudo python -m benchmarks.peers --mbit 0 1000 200

All layers have the same shape and dtype (SwiGLU experts, top-2, fp32) and the same router weights, hence nearly the same
rows per expert. They take turns, pass by pass, in the same processes. What is not installed, or does not run here, is
skipped with the reason. Bytes are those that leave the network interfaces.

What differs by design, and is theirs: fairscale pads every expert to a capacity of twice the mean and drops rows beyond it;
DeepSpeed without dropping pads every expert to the fullest one; transformers shares all tokens of all ranks with every rank
and sums their outputs, so it exchanges no rows. megatron-core needs stand-ins for CUDA streams on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import ROOT, progress, table, write_result
from benchmarks.slow_link import run_ranks, sent_bytes, set_rate, why_not
from megatron_lsh.config import LSHConfig, ModelConfig, MoEConfig, ParallelConfig
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.telemetry import MoETelemetry
from megatron_lsh.parallel.context import ParallelContext
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.parallel.parameters import initialize_parameters, local

PORT = 29651


@dataclass(frozen=True)
class Shape:
    """T tokens per rank, D hidden, F expert width, E experts."""

    tokens: int = 2048
    hidden: int = 256
    ffn: int = 1024
    experts: int = 8
    topk: int = 2


@dataclass(frozen=True)
class Peer:
    """A layer, ready to run: rows [T, D] -> [T, D]; and its parameters."""

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    version: str
    shares_tokens: bool = False
    """its ranks take all ranks' tokens instead of their own"""


class Expert(nn.Module):
    """SwiGLU, for the frameworks that take any module."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.fc2 = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)


# The frameworks. Each builder takes (shape, router weight [E, D], context); it imports what it needs.


def ours(lsh_flags: dict[str, Any] | None, shape: Shape, router_ED: Tensor, ctx: ParallelContext) -> Peer:
    import megatron_lsh

    model = ModelConfig(hidden_size=shape.hidden, num_layers=1, swiglu=True, add_bias_linear=False)
    moe = MoEConfig(num_experts=shape.experts, moe_ffn_hidden_size=shape.ffn, moe_router_topk=shape.topk)
    moe.moe_token_dispatcher_type = "alltoall" if lsh_flags is None else "lsh"
    lsh = LSHConfig(**(lsh_flags or {}))
    layer = MoELayer(model, moe, lsh, ctx, 0, MoETelemetry(ctx.device))
    initialize_parameters(layer, seed=1)
    with torch.no_grad():
        local(layer.router.weight).copy_(router_ED)
    return Peer(lambda x_TD: layer(x_TD.unsqueeze(1))[0].squeeze(1), layer, megatron_lsh.__version__)


def megatron_core(shape: Shape, router_ED: Tensor, ctx: ParallelContext) -> Peer:
    _pretend_cuda_streams()
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe.moe_layer import MoELayer as TheirLayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe_utils.te_general_gemm = None  # not defined without Transformer Engine
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ctx.ep.size)
    config = TransformerConfig(
        num_layers=1, hidden_size=shape.hidden, num_attention_heads=4, ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts, moe_ffn_hidden_size=shape.ffn, moe_router_topk=shape.topk,
        expert_model_parallel_size=ctx.ep.size, moe_token_dispatcher_type="alltoall", gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True, bias_activation_fusion=False,
        moe_router_load_balancing_type="none", moe_grouped_gemm=False,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=shape.experts, moe_grouped_gemm=False)
    layer = TheirLayer(config, submodules=spec.submodules, layer_number=1)
    layer.router.weight.data.copy_(router_ED)
    return Peer(lambda x_TD: layer(x_TD.unsqueeze(1))[0].squeeze(1), layer, megatron.core.__version__)


def deepspeed(shape: Shape, router_ED: Tensor, ctx: ParallelContext) -> Peer:
    os.environ["DS_ACCELERATOR"] = "cpu"
    framework = importlib.import_module("deepspeed")
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # would compile for minutes
    from deepspeed.moe.layer import MoE

    framework.init_distributed(dist_backend="gloo")
    layer = MoE(
        shape.hidden, Expert(shape), num_experts=shape.experts, ep_size=ctx.ep.size, k=shape.topk, drop_tokens=False,
        top2_2nd_expert_sampling=False,
    )  # fmt: skip
    layer.set_deepspeed_parallelism()
    layer.deepspeed_moe.gate.wg.weight.data.copy_(router_ED)
    return Peer(lambda x_TD: layer(x_TD)[0], layer, framework.__version__)


def fairscale(shape: Shape, router_ED: Tensor, ctx: ParallelContext) -> Peer:
    framework = importlib.import_module("fairscale")
    from fairscale.nn.moe import MOELayer, Top2Gate

    experts = nn.ModuleList([Expert(shape) for _ in range(shape.experts // ctx.ep.size)])
    layer = MOELayer(Top2Gate(shape.hidden, shape.experts), experts)
    layer.gate.wg.weight.data.copy_(router_ED)
    return Peer(lambda x_TD: layer(x_TD.unsqueeze(1)).squeeze(1), layer, framework.__version__)


def transformers(shape: Shape, router_ED: Tensor, ctx: ParallelContext) -> Peer:
    framework = importlib.import_module("transformers")
    from transformers.distributed import DistributedConfig

    config = framework.Qwen3MoeConfig(
        vocab_size=64, hidden_size=shape.hidden, moe_intermediate_size=shape.ffn, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, num_experts=shape.experts, num_experts_per_tok=shape.topk,
        norm_topk_prob=True,
    )  # fmt: skip
    place = [tempfile.mkdtemp()]
    dist.broadcast_object_list(place, src=0)
    if ctx.rank == 0:
        framework.Qwen3MoeForCausalLM(config).save_pretrained(place[0])
    dist.barrier()
    parallel = DistributedConfig(tp_size=ctx.ep.size, ep_size=ctx.ep.size)
    layer = framework.Qwen3MoeForCausalLM.from_pretrained(place[0], distributed_config=parallel).model.layers[0].mlp
    with torch.no_grad():
        weight = layer.gate.weight
        (weight.to_local() if hasattr(weight, "to_local") else weight).copy_(router_ED)
    return Peer(
        lambda x_TD: _first(layer(x_TD.unsqueeze(0))).squeeze(0), layer, framework.__version__, shares_tokens=True
    )


BUILDERS: dict[str, Callable[[Shape, Tensor, ParallelContext], Peer]] = {
    "megatron_lsh, exact": partial(ours, None),
    "megatron_lsh, LSH 20%": partial(ours, {}),
    "megatron_lsh, LSH 20%, int8": partial(ours, {"lsh_wire_dtype": "int8"}),
    "transformers": transformers,  # before megatron-core, whose stand-ins for CUDA confuse it
    "megatron-core": megatron_core,
    "deepspeed": deepspeed,
    "fairscale": fairscale,
}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's function of this job, for tensors that are on the host already."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


class _Stream:
    """A CUDA stream or event of which nothing is asked."""

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: self


def _pretend_cuda_streams() -> None:
    stream = _Stream()
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.Stream = lambda *args, **kwargs: stream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *args: stream  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment, return-value]


# On the ranks


def work(arguments: argparse.Namespace) -> None:
    """One rank: build what can be built, run it in turn on each link; rank 0 writes the figures."""
    warnings.simplefilter("ignore")
    ranks, shape = arguments.ranks, Shape(tokens=arguments.tokens, hidden=arguments.hidden, ffn=arguments.ffn)
    ctx = initialize(
        ParallelConfig(expert_model_parallel_size=ranks, device="cpu", distributed_timeout_minutes=3), moe=True
    )
    generator = torch.Generator().manual_seed(0)
    router_ED = 0.02 * torch.randn(shape.experts, shape.hidden, generator=generator)
    all_tokens = torch.randn(ranks * shape.tokens, shape.hidden, generator=generator)
    peers: dict[str, Peer] = {}
    skipped: dict[str, str] = {}
    for name in arguments.peers:
        peer, reason = _build(name, shape, router_ED, ctx, all_tokens)
        if peer is None:
            skipped[name] = reason
        else:
            peers[name] = peer
    links, started = [], time.monotonic()
    for number, mbit in enumerate(arguments.mbit):
        set_rate(mbit or None)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
        for repeat in range(arguments.repeats):
            for name in list(peers) if repeat % 2 == 0 else list(peers)[::-1]:
                samples[name].append(_measure(peers[name], all_tokens, ctx))
            if ctx.rank == 0:
                done, total = number * arguments.repeats + repeat + 1, len(arguments.mbit) * arguments.repeats
                progress(done, total, started, f"{mbit:g} Mbit/s" if mbit else "link at full speed")
        links.append({"mbit_per_rank": mbit or None, "samples": samples})
    set_rate(None)
    if ctx.rank == 0:
        versions = {name: peer.version for name, peer in peers.items()}
        figures = {"ranks": ranks, "shape": vars(shape), "versions": versions, "skipped": skipped, "links": links}
        Path(arguments.out).write_text(json.dumps(figures))
    shutdown(ctx)


def _build(
    name: str, shape: Shape, router_ED: Tensor, ctx: ParallelContext, all_tokens: Tensor
) -> tuple[Peer | None, str]:
    """A peer that has run twice on every rank, or why there is none."""
    reason = ""
    peer: Peer | None = None
    try:
        peer = BUILDERS[name](shape, router_ED, ctx)
    except ImportError as error:
        reason = f"not installed: {error}"
    except Exception as error:  # other people's code: whatever it raises is the reason
        reason = f"cannot be built here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    ready = torch.tensor(float(peer is not None))
    dist.all_reduce(ready, dist.ReduceOp.MIN, group=ctx.world.process_group)
    if peer is None or not ready:
        return None, reason or "cannot be built on another rank"
    for _ in range(2):
        _measure(peer, all_tokens, ctx)
    return peer, ""


def _measure(peer: Peer, all_tokens: Tensor, ctx: ParallelContext) -> dict[str, float]:
    """One forward and backward pass: ms of the slowest rank, MB sent by all ranks."""
    mine = all_tokens if peer.shares_tokens else all_tokens.chunk(ctx.world.size)[ctx.rank]
    x_TD = mine.clone().requires_grad_()
    dist.barrier(group=ctx.world.process_group)
    before, started = sent_bytes(), time.perf_counter()
    y_TD = peer.run(x_TD)
    y_TD.square().mean().backward()
    elapsed = torch.tensor(1e3 * (time.perf_counter() - started), dtype=torch.float64)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX, group=ctx.world.process_group)
    sent = torch.tensor((sent_bytes() - before) / 1e6, dtype=torch.float64)
    dist.all_reduce(sent, group=ctx.world.process_group)
    peer.module.zero_grad(set_to_none=True)
    return {"ms": float(elapsed), "mb": float(sent)}


# Around the ranks


def report(result: dict[str, Any]) -> str:
    """Markdown: tokens/s and time per link, bytes sent; then what was skipped."""
    tokens = result["ranks"] * result["shape"]["tokens"]
    names = [f"{link['mbit_per_rank']:g} Mbit/s" if link["mbit_per_rank"] else "full speed" for link in result["links"]]
    rows = []
    for peer, version in result["versions"].items():
        cells = []
        for link in result["links"]:
            times = [sample["ms"] for sample in link["samples"][peer]]
            median = statistics.median(times)
            cells.append(f"{1e3 * tokens / median:,.0f} ({median:.0f} ms, {min(times):.0f}-{max(times):.0f})")
        sent = statistics.median(sample["mb"] for link in result["links"] for sample in link["samples"][peer])
        rows.append([peer, version, *cells, f"{sent:.1f}"])
    head = ["layer", "version", *(f"tokens/s, {name}" for name in names), "MB sent"]
    skipped = [f"skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join([table(head, rows), "", *skipped])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(BUILDERS), choices=list(BUILDERS), metavar="LAYER")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--mbit", nargs="+", type=float, default=[0, 1000, 200], help="rates of the links; 0: full speed"
    )
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="per rank")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--ffn", type=int, default=Shape.ffn)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--name", default="peers", help="of the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return work(arguments)
    if reason := why_not():
        raise SystemExit(f"peers cannot run here: {reason}")
    result = run_ranks("benchmarks.peers", sys.argv[1:] if words is None else words, PORT, arguments.ranks)
    print(f"\n{report(result)}\n")
    print(f"wrote {write_result(arguments.name, result).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
