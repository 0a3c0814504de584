"""Measure the share of the all-to-all in a training step, exact and with LSH, for your model on your cluster.

    torchrun --nproc-per-node 8 -m megatron_lsh profile_alltoall THE FLAGS OF pretrain_gpt_moe.py [--steps 8] [--json FILE]
    torchrun ... -m megatron_lsh profile_alltoall THE FLAGS OF pretrain_gpt_moe.py --primitives-out FILE

With --primitives-out it measures what tools/plan.py computes with: all-to-alls by size, inside a node and between nodes,
how fast experts, LSH and all else are, and how overlap slows them; a cluster file can `include` the file. Else it runs a few
steps of each kind in turn; saves and loads nothing. Prints the break-even bandwidth, at which LSH stops paying, and a
prediction for other clusters from a cost model fitted to the measurement (megatron_lsh/plan/cost_model.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron_lsh.config import Config, assumed_world_size, required, validate
from megatron_lsh.config.tool_flags import ToolParser, a_path, check_place, integer, real
from megatron_lsh.families import GPT
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.plan.cost_model import as_json, fit, measured_text, predicted_text
from megatron_lsh.training.alltoall_profile import measure, profiling_config
from megatron_lsh.training.faults import launch
from megatron_lsh.training.primitives import iterations_for, measure_primitives
from megatron_lsh.training.run import set_up
from megatron_lsh.training.startup import introduce, set_determinism


def own_flags() -> ToolParser:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=integer(1), default=8, help="measured steps of each kind")
    parser.add_argument("--json", type=a_path, help="write everything measured and fitted to this file")
    parser.add_argument(
        "--primitives-out", type=a_path, help="measure primitives for tools/plan.py, and write them to this file"
    )
    predict = parser.add_argument_group("what to predict for")
    gbit, speeds = [1, 10, 25, 50, 100, 200, 400], [1, 10, 100, 1000]
    predict.add_argument("--predict-gbit", nargs="+", type=real(above=0), default=gbit, help="bandwidths per rank")
    predict.add_argument("--predict-ranks", type=integer(1), help="expert-parallel ranks (default: as measured)")
    predict.add_argument(
        "--predict-compute", nargs="+", type=real(above=0), default=speeds, help="times as fast as this machine"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""

    def configure() -> tuple[argparse.Namespace, Config]:
        own, flags = own_flags().parse_known_args(words)
        cfg = GPT.parse(flags)
        for flag, path in (("--json", own.json), ("--primitives-out", own.primitives_out)):
            if path is not None:
                check_place(flag, path)
        return own, profiling_config(validate(cfg, assumed_world_size(cfg)))

    return launch(configure, lambda job: profile(*job))


def profile(own: argparse.Namespace, cfg: Config) -> None:
    """Measure, and report on rank 0."""
    set_determinism(cfg)
    ctx = initialize(cfg.parallel, moe=True)
    introduce(cfg, ctx)
    if own.primitives_out is not None:
        cfg.training.train_iters = max(
            cfg.training.train_iters or 0, iterations_for(own.steps)
        )  # so much data is needed
        primitives = measure_primitives(set_up(cfg, GPT, ctx), own.steps)
        if ctx.rank == 0:
            own.primitives_out.write_text(json.dumps(primitives, indent=1) + "\n")
            print(
                f"wrote {own.primitives_out}: put `include: {own.primitives_out.name}` into a cluster file", flush=True
            )
        return shutdown(ctx)
    exact, lsh = measure(cfg, GPT, ctx, own.steps)
    if ctx.rank == 0:
        ranks = ctx.ep.size
        model = fit(exact, lsh, topk=cfg.moe.moe_router_topk, hidden=required(cfg.model.hidden_size), ranks=ranks)
        print(measured_text(exact, lsh, model), end="\n\n")
        print(predicted_text(model, own.predict_gbit, own.predict_ranks or ranks, own.predict_compute), flush=True)
        if own.json is not None:
            own.json.write_text(json.dumps(as_json(exact, lsh, model), indent=1) + "\n")
    shutdown(ctx)
