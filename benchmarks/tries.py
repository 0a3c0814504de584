"""Ideas that compete with LSH as it is, decided on the rows that benchmarks/wide_fits.py keeps.

    python -m benchmarks.tries --iters 600 --of 1600 --joined 4
    python -m benchmarks.tries --iters 300 --sets 2 --name tries_sets --flags
        --num-experts 16 --moe-router-topk 8 --moe-ffn-hidden-size 64      # and 64 experts: --name tries_sets_64

Seeds inherited from the MoE layer before: rows of an expert whose tokens shared a cluster there begin in one cluster here,
the largest of these as many as the budget allows; then one refinement, as after hashing and after random seeds. If that were
closer, hashing could be left out in all layers but the first.

A subspace in 4 bits: every row travels, as R coordinates in a basis of its layer (leading directions of other micro-batches'
rows, as a slowly moving basis has them) in int4 with a scale per 32 numbers; outputs likewise. Beside LSH at equal bytes, in
bf16 and in the same int4.

Tokens with the same experts on a node (``--sets NODES``), which could cluster and be de-duplicated at once: one row per
cluster of (token, node) rows goes out, and the weighted sum of its experts comes back. Beside LSH by expert at as many rows.

Figures: relative squared error of the tokens' outputs, mean over layers; bytes at most, relative to all rows in bf16
(coordinates are a multiple of 32).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.clustering import Group, Method, hashed, random_seeds
from benchmarks.common import ROOT, table, write_result
from benchmarks.wide_fits import Tokens, Weights, saved
from megatron_lsh import lsh
from megatron_lsh.lsh import Clusters, cluster_sizes, expert_of_row, nearest_centroid
from megatron_lsh.lsh.interpolate import BLOCK
from megatron_lsh.moe.experts import Feed
from megatron_lsh.moe.permute import Permutation, permute
from megatron_lsh.ops import choose

WIRE, ONE_FIT = "int4x32", 1 << 16


def coded(rows_ND: Tensor) -> Tensor:
    """Rounded as if they had travelled in 4 bits."""
    ops = choose(rows_ND)
    noise_ND = torch.rand(rows_ND.shape, generator=torch.Generator().manual_seed(0))
    return ops.decode(ops.encode(rows_ND, noise_ND, WIRE), WIRE, rows_ND.shape[1], rows_ND.dtype)


def error(group: Group, rows_out_ND: Tensor) -> float:
    """Of the tokens' outputs."""
    return relative(group.tokens(rows_out_ND), group.tokens(group.outputs(group.rows_ND, group.counts_E)))


def relative(y_TD: Tensor, exact_TD: Tensor) -> float:
    """The error's share of the energy."""
    return float((y_TD - exact_TD).square().sum() / exact_TD.square().sum())


def restored(group: Group, clusters: Clusters, in_few_bits: bool = False, block: int = BLOCK) -> Tensor:
    """What LSH gives back for these clusters."""
    member_C = lsh.nearest_members(group.rows_ND, clusters)
    sent_CD = coded(group.rows_ND[member_C]) if in_few_bits else group.rows_ND[member_C]
    out_CD = group.outputs(sent_CD, clusters.counts_E)
    out_CD = coded(out_CD) if in_few_bits else out_CD
    return lsh.interpolate(out_CD, group.rows_ND, sent_CD, clusters, member_C, block=block)


def inherited(before_T: Tensor) -> Method:
    """``before_T``: the cluster in which each token's first row was in the layer before."""

    def method(group: Group, rate: float) -> Clusters:
        budgets_E, count = lsh.row_budgets(group.counts_E, rate), group.rows_ND.shape[0]
        token_N = torch.empty(count, dtype=torch.int64)
        tokens, topk = group.permutation.row_of_TK.shape
        token_N[group.permutation.row_of_TK.flatten()] = torch.arange(tokens).repeat_interleave(topk)
        key_N = expert_of_row(group.counts_E, count) * (int(before_T.max()) + 1) + before_T[token_N]
        keys_G, group_N, sizes_G = key_N.unique(return_inverse=True, return_counts=True)
        means_GD = torch.zeros(len(keys_G), group.rows_ND.shape[1]).index_add_(0, group_N, group.rows_ND)
        means_GD /= sizes_G.unsqueeze(1)
        expert_G = keys_G // (int(before_T.max()) + 1)
        seeds, first = [], 0
        for expert, (rows, budget) in enumerate(zip(group.counts_E.tolist(), budgets_E.tolist(), strict=True)):
            mine_G = (expert_G == expert).nonzero().squeeze(1)
            largest_G = mine_G[sizes_G[mine_G].argsort(descending=True, stable=True)][:budget]
            spare = group.rows_ND[first : first + rows][torch.randperm(rows)[: budget - len(largest_G)]]
            seeds += [means_GD[largest_G], spare]
            first += rows
        nearest_N, _ = nearest_centroid(group.rows_ND, torch.cat(seeds), group.counts_E.tolist(), budgets_E.tolist())
        total = int(budgets_E.sum())
        return Clusters.from_assignment(nearest_N, cluster_sizes(nearest_N, total), budgets_E)

    return method


def seeds(layers: list[Tokens], joined: int, rate: float) -> dict[str, float]:
    """Errors by where clusters begin, over the layers that have one before them."""
    groups = [tokens.group(joined) for tokens in layers]
    found: dict[str, list[float]] = {"hashed": [], "random": [], "inherited": []}
    before: Clusters | None = None
    for number, group in enumerate(groups):
        here = hashed()(group, rate)
        if before is not None:
            before_T = before.cluster_N[groups[number - 1].permutation.row_of_TK[:, 0]]
            ways = {
                "hashed": here,
                "random": random_seeds(2)(group, rate),
                "inherited": inherited(before_T)(group, rate),
            }
            for name, clusters in ways.items():
                found[name].append(error(group, restored(group, clusters)))
        before = here
    return {name: statistics.mean(errors) for name, errors in found.items()}


def leading(x_ND: Tensor, dims: int) -> Tensor:
    """[D, R]: eigenvectors of the second moments."""
    return torch.linalg.eigh(x_ND.T @ x_ND)[1].flip(1)[:, :dims]


def subspace(tokens: Tokens, joined: int, dims: int) -> float:
    """Error with all rows in so many coordinates, 4 bits each, in a basis of the micro-batches after these."""
    group, count = tokens.group(joined), joined * tokens.per_micro_batch
    other = Tokens(
        tokens.experts, tokens.x_TD[count:], tokens.ids_TK[count:], tokens.probs_TK[count:], tokens.per_micro_batch
    ).group(joined)
    inputs_DR = leading(other.rows_ND, dims)
    outputs_DR = leading(other.outputs(other.rows_ND, other.counts_E), dims)
    arrived_ND = coded(group.rows_ND @ inputs_DR) @ inputs_DR.T
    return error(group, coded(group.outputs(arrived_ND, group.counts_E) @ outputs_DR) @ outputs_DR.T)


class OfNode(NamedTuple):
    """The tokens that have experts on one node, with all that the node adds to them.

    Attributes:
        x_TD: [T, D].
        set_T: int64, which set of experts each has there.
        weights_TE: fp32, those of the experts there, else 0.
        exact_TD: the weighted sum over these experts.
    """

    experts: Weights
    x_TD: Tensor
    set_T: Tensor
    weights_TE: Tensor
    exact_TD: Tensor

    @staticmethod
    def of(tokens: Tokens, joined: int, nodes: int, node: int) -> OfNode:
        count = joined * tokens.per_micro_batch
        x_TD, ids_TK, probs_TK = (t[:count] for t in (tokens.x_TD, tokens.ids_TK, tokens.probs_TK))
        experts = len(tokens.experts.fc1_EFD)
        here = slice(node * experts // nodes, (node + 1) * experts // nodes)
        weights_TE = torch.zeros(count, experts).scatter_(1, ids_TK, probs_TK.float())[:, here]
        there_T = (weights_TE > 0).any(1)
        x_TD, weights_TE = x_TD[there_T], weights_TE[there_T]
        _, set_T = (weights_TE > 0).unique(dim=0, return_inverse=True)
        on_node = Weights(*(w[here] for w in tokens.experts))
        return OfNode(on_node, x_TD, set_T, weights_TE, _weighted_sum(on_node, x_TD, weights_TE))

    def by_expert(self, rate: float) -> float:
        """Error of the sums if rows cluster by expert as they do."""
        probs_TK, ids_TK = self.weights_TE.topk(int((self.weights_TE > 0).sum(1).max()), 1)
        ids_TK = torch.where(probs_TK > 0, ids_TK, -1)
        count, experts = int((ids_TK >= 0).sum()), self.weights_TE.shape[1]
        rows_ND, counts_E, permutation = permute(self.x_TD, ids_TK, experts, num_rows=count)
        group = Group(self.experts, rows_ND, counts_E, probs_TK, permutation, torch.empty(0))
        return relative(group.tokens(restored(group, hashed()(group, rate), block=ONE_FIT)), self.exact_TD)

    def by_set(self, rate: float) -> tuple[float, int]:
        """The same if tokens with the same experts cluster, and the sum of their representative comes back; and how many
        rows are sent."""
        order_N, counts_S = self.set_T.argsort(stable=True), self.set_T.bincount()
        x_ND, weights_NE = self.x_TD[order_N], self.weights_TE[order_N]
        nothing = torch.empty(0, dtype=torch.int64)
        whole = Permutation(nothing, nothing, counts_S)
        clusters = hashed()(Group(self.experts, x_ND, counts_S, torch.empty(0), whole, torch.empty(0)), rate)
        member_C = lsh.nearest_members(x_ND, clusters)
        out_CD = _weighted_sum(self.experts, x_ND[member_C], weights_NE[member_C])
        y_ND = lsh.interpolate(out_CD, x_ND, x_ND[member_C], clusters, member_C, block=ONE_FIT)
        return relative(y_ND, self.exact_TD[order_N]), clusters.num_clusters


def _weighted_sum(experts: Weights, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
    """Of each row's experts, those with a weight."""
    y_ND = torch.zeros_like(x_ND)
    for expert, of_expert_N in enumerate(weights_NE.T):
        mine_M = of_expert_N.nonzero().squeeze(1)
        one = Weights(*(w[expert : expert + 1] for w in experts))
        y_ND[mine_M] += of_expert_N[mine_M, None] * one(Feed(x_ND[mine_M], [len(mine_M)]))
    return y_ND


def by_sets(layers: list[Tokens], joined: int, nodes: int, rates: Sequence[float]) -> list[dict[str, Any]]:
    """Errors of both ways at as many rows, of the first node; means over the layers."""
    cases, found = [OfNode.of(tokens, joined, nodes, 0) for tokens in layers], []
    for rate in rates:
        of_layers = []
        for case in cases:
            joint, rows = case.by_set(rate)
            of_layers.append({
                "sets": int(case.set_T.max()) + 1,
                "rows per token": rows / len(case.x_TD),
                "by set": joint,
                "by expert": case.by_expert(rows / int((case.weights_TE > 0).sum())),
            })  # fmt: skip
        mean = {key: statistics.mean(each[key] for each in of_layers) for key in of_layers[0]}
        found.append({"rate": rate, **mean, "layers": of_layers})
    lines = [
        [f"{f['rate']:g}", f"{f['sets']:.0f}", f"{f['rows per token']:.2f}", f"{f['by set']:.3f}", f"{f['by expert']:.3f}"]
        for f in found
    ]  # fmt: skip
    header = ["rate of tokens", "sets of experts", "rows per token", "error, by set", "by expert, as many rows"]
    print(f"{joined * layers[0].per_micro_batch:,} tokens\n\n{table(header, lines)}")
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=1600, help="steps of exact training before")
    parser.add_argument("--of", type=int, help="steps that its learning rate is planned for")
    parser.add_argument("--joined", type=int, default=4, help="micro-batches whose rows cluster together")
    parser.add_argument("--sets", type=int, metavar="NODES", help="only this, over so many nodes")
    parser.add_argument("--micro-batches", type=int, default=16, help="that are kept")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "wide_fits", help="where rows are kept")
    parser.add_argument("--name", default="tries", help="of the result file")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for pretrain_gpt_moe.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    planned = arguments.of or arguments.iters
    joined, iters = arguments.joined, arguments.iters
    layers = saved([iters], planned, arguments.micro_batches, arguments.flags, arguments.folder)[iters]
    settings = {"iters": iters, "of": planned, "joined": joined, "rate": arguments.rate}
    if arguments.sets is not None:
        found = by_sets(layers, joined, arguments.sets, (arguments.rate, 2 * arguments.rate))
        settings |= {"flags": arguments.flags, "nodes": arguments.sets, "sets": found}
        print(f"wrote {write_result(arguments.name, settings)}")
        return
    by_seeds = seeds(layers, joined, arguments.rate)
    print(table(["seeds", "error"], [[name, f"{found:.4f}"] for name, found in by_seeds.items()]))
    results: list[dict[str, Any]] = []
    hidden = layers[0].x_TD.shape[1]
    groups = [tokens.group(joined) for tokens in layers]
    for share in (1 / 4, 1 / 8):
        bits = 4 + 16 / 32  # a scale in bf16 per 32 numbers
        rate, rate4, dims = share, share * 16 / bits, int(share * hidden * 16 / bits) // 32 * 32
        errors = {
            f"LSH, bf16, {rate:.0%} of the rows": [error(g, restored(g, hashed()(g, rate))) for g in groups],
            f"LSH, {WIRE}, {rate4:.0%} of the rows": [error(g, restored(g, hashed()(g, rate4), True)) for g in groups],
            f"{dims} of {hidden} coordinates, {WIRE}": [subspace(t, joined, dims) for t in layers],
        }
        results += [
            {"bytes": share, "way": way, "error": statistics.mean(each), "layers": each} for way, each in errors.items()
        ]
    lines = [[f"{r['bytes']:.1%}", r["way"], f"{r['error']:.4f}"] for r in results]
    print(table(["bytes at most", "way", "error"], lines))
    print(f"wrote {write_result(arguments.name, settings | {'seeds': by_seeds, 'equal bytes': results})}")


if __name__ == "__main__":
    main()
