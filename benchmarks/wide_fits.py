"""Wide fits in few coordinates: interpolation between hundreds of representatives, in r coordinates of rows and outputs.

    python -m benchmarks.wide_fits --iters 150 300 600 --of 1600 --joined 4 16
    python -m benchmarks.wide_fits --iters 100 300 600 --of 600 --joined 16 --ranks 16 32 64 128 --repeats 0
        --name wide_fits_512 --flags --hidden-size 512 --moe-ffn-hidden-size 1024 --num-layers 2 --num-attention-heads 8
        --micro-batch-size 2 --global-batch-size 2 --lr 2e-3

Trains the model of benchmarks/quality.py exactly and takes the rows of its MoE layers, those of --joined micro-batches
together as a node would have them (kept in runs/: a second call reads them). Then --lsh-residual interpolate restores them,
with blocks of --blocks representatives in all coordinates and in --ranks (lsh/leading.py). Figures: relative squared
error of the tokens' outputs (mean over layers); operations as a share of the exact experts' (lsh/cost.py); and time,
forward and backward, over that of blocks of 128 in all coordinates (of this process, in turn, median).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clustering import Group, capture, hashed, training
from benchmarks.common import ROOT, progress, table, write_result
from megatron_lsh import lsh
from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.cost import operations
from megatron_lsh.lsh.interpolate import FORMS
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.training.run import Run


class Weights(NamedTuple):
    """SwiGLU experts as plain tensors, which can be kept in a file: [E, 2 F, D] and [E, D, F]."""

    fc1_EFD: Tensor
    fc2_EDF: Tensor

    @staticmethod
    def of(experts: Experts) -> Weights:
        """The parameters of these."""
        return Weights(*(layer.local()[0].detach().clone() for layer in (experts.linear_fc1, experts.linear_fc2)))

    def __call__(self, feed: Feed) -> Tensor:
        parts = feed.rows.split(torch.as_tensor(feed.counts).tolist())
        out = []
        for rows_ND, fc1_FD, fc2_DF in zip(parts, self.fc1_EFD, self.fc2_EDF, strict=True):
            gate_NF, up_NF = (rows_ND @ fc1_FD.T).chunk(2, dim=1)
            out.append(F.silu(gate_NF) * up_NF @ fc2_DF.T)
        return torch.cat(out)


class Tokens(NamedTuple):
    """Of one MoE layer and some micro-batches one after the other: [T, D], [T, K], [T, K]."""

    experts: Weights
    x_TD: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    per_micro_batch: int

    def group(self, micro_batches: int) -> Group:
        """What the first of them bring together."""
        count = micro_batches * self.per_micro_batch
        x_TD, ids_TK, probs_TK = (tensor[:count] for tensor in (self.x_TD, self.ids_TK, self.probs_TK))
        return Group.of(self.experts, x_TD, ids_TK, probs_TK, len(self.experts.fc1_EFD))


def saved(
    steps: list[int], planned: int, micro_batches: int, flags: list[str], folder: Path
) -> dict[int, list[Tokens]]:
    """The layers' tokens after each of these steps of one run, which is made if a file of them is missing."""
    words = "_".join(["", *(word.lstrip("-") for word in flags)])
    paths = {step: folder / f"{micro_batches}_after_{step}_of_{planned}{words}.pt" for step in steps}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with training(planned, *flags) as (run, batches):
            started = time.monotonic()
            for step in range(steps[-1]):
                run.model.train()
                run.step(batches, step, stop=False)
                if (step + 1) % 20 == 0:
                    progress(step + 1, steps[-1], started, "training")
                if step + 1 in paths:
                    # As plain tuples, which any script reads.
                    torch.save([(tuple(t[0]), *t[1:]) for t in _tokens(run, micro_batches)], paths[step + 1])
    return {step: [Tokens(Weights(*w), *rest) for w, *rest in torch.load(path)] for step, path in paths.items()}


def _tokens(run: Run, micro_batches: int) -> list[Tokens]:
    layers = []
    for layer in capture(run, micro_batches):
        experts, first_TD, _ = layer[0]
        x_TD, ids_TK, probs_TK = (
            torch.cat(parts)
            for parts in zip(*((x, routing.expert_ids_TK, routing.probs_TK) for _, x, routing in layer), strict=True)
        )
        layers.append(Tokens(Weights.of(experts), x_TD, ids_TK, probs_TK, len(first_TD)))
    return layers


class Case(NamedTuple):
    """One layer's rows, clustered, what was sent, and what came back."""

    group: Group
    clusters: Clusters
    member_C: Tensor
    out_CD: Tensor
    exact_TD: Tensor

    @staticmethod
    @torch.no_grad()
    def of(group: Group, rate: float) -> Case:
        clusters = hashed()(group, rate)
        member_C = lsh.nearest_members(group.rows_ND, clusters)
        exact_TD = group.tokens(group.outputs(group.rows_ND, group.counts_E))
        return Case(group, clusters, member_C, group.outputs(group.rows_ND[member_C], clusters.counts_E), exact_TD)

    @torch.no_grad()
    def error(self, block: int, rank: int | None) -> float:
        """Of the tokens' outputs, relative and squared."""
        rows_ND = self.group.rows_ND
        sent_CD = rows_ND[self.member_C]
        y_ND = self.restored(self.out_CD, rows_ND, sent_CD, block, rank)
        return float((self.group.tokens(y_ND) - self.exact_TD).square().sum() / self.exact_TD.square().sum())

    def restored(self, out_CD: Tensor, rows_ND: Tensor, sent_CD: Tensor, block: int, rank: int | None) -> Tensor:
        """As training does it."""
        given = (out_CD, rows_ND, sent_CD, self.clusters, self.member_C)
        if rank is None:
            return lsh.interpolate(*given, block=block)
        return lsh.interpolate_leading(*given, block=block, rank=rank)

    def seconds(self, block: int, rank: int | None) -> float:
        """Of the process, forward and backward."""
        inputs = (self.out_CD, self.group.rows_ND, self.group.rows_ND[self.member_C])
        out_CD, rows_ND, sent_CD = (x.detach().requires_grad_() for x in inputs)
        started = time.process_time()
        y_ND = self.restored(out_CD, rows_ND, sent_CD, block, rank)
        y_ND.backward(torch.ones_like(y_ND))
        return time.process_time() - started


def analyse(layers: list[Tokens], step: int, joined: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors and shares of all blocks and ranks."""
    groups = [tokens.group(joined) for tokens in layers]
    width, hidden = layers[0].experts.fc2_EDF.shape[2], layers[0].x_TD.shape[1]
    cases = [Case.of(group, arguments.rate) for group in groups]
    rows_per_group = statistics.mean(float(group.counts_E.double().mean()) for group in groups)
    wanted = [(block, rank) for block in arguments.blocks for rank in (None, *arguments.ranks)]
    wanted = [(block, rank) for block, rank in wanted if rank is None or rank < hidden]
    repeats = arguments.repeats if joined == arguments.joined[0] else 0
    seconds = [[cases[-1].seconds(*each) for each in ((128, None), *wanted)] for _ in range(repeats)]
    results: list[dict[str, Any]] = []
    for number, (block, rank) in enumerate(wanted):
        forms = FORMS if rank is None else ("outputs",)
        share = min(operations(form, block, hidden, arguments.rate, rank) for form in forms) / (18 * width * hidden)
        errors = [case.error(block, rank) for case in cases]
        over = statistics.median(row[number + 1] / row[0] for row in seconds) if seconds else None
        results.append(
            {
                "block": block,
                "rank": rank,
                "share": share,
                "time": over,
                "error": statistics.mean(errors),
                "layers": errors,
            }
        )
    lines = [
        [
            r["block"],
            r["rank"] or "all",
            f"{r['share']:.1%}",
            f"{r['time']:.2f}" if r["time"] else "",
            f"{r['error']:.4f}",
        ]
        for r in results
    ]
    print(f"{rows_per_group:.0f} rows per group, D {hidden}, F {width}, {step} iterations before\n")
    print(table(["block", "coordinates", "of the experts' arithmetic", "time", "error"], lines), flush=True)
    return {"iters": step, "joined": joined, "rows_per_group": rows_per_group, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--iters", nargs="+", type=int, default=[1600], help="steps of exact training before, of one run"
    )
    parser.add_argument(
        "--of", type=int, help="steps that its learning rate is planned for (default: the last of --iters)"
    )
    parser.add_argument("--joined", nargs="+", type=int, default=[4], help="micro-batches whose rows cluster together")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--blocks", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 64], help="coordinates")
    parser.add_argument("--repeats", type=int, default=5, help="of time, with the first of --joined")
    parser.add_argument("--name", default="wide_fits", help="of the result file")
    parser.add_argument("--micro-batches", type=int, default=16, help="that are kept")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "wide_fits", help="where")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for pretrain_gpt_moe.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = sorted(arguments.iters)
    found = saved(steps, arguments.of or steps[-1], arguments.micro_batches, arguments.flags, arguments.folder)
    results = [analyse(layers, step, j, arguments) for step, layers in found.items() for j in arguments.joined]
    settings = {"flags": arguments.flags, "rate": arguments.rate}
    print(f"wrote {write_result(arguments.name, settings | {'results': results})}")


if __name__ == "__main__":
    main()
