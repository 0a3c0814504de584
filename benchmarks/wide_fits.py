"""Wide fits in few dimensions: interpolation between hundreds of representatives, in the leading coordinates of the rows.

    python -m benchmarks.wide_fits --iters 1600 --joined 4
    python -m benchmarks.wide_fits --iters 1600 --flags --hidden-size 512 --moe-ffn-hidden-size 1024

Trains the model of benchmarks/quality.py exactly and takes the rows of its MoE layers, those of --joined micro-batches
together as a node would have them. The kernel of lsh/interpolate.py then sees only the r leading coordinates of the rows,
by a randomised range finder on the representatives, and the outputs only their rho leading directions. Costs per row,
forward and backward:

    full       12 B D                                                                   lsh/cost.py has the smaller terms
    in few     6 B (r + rho) + 4 (r + rho) D + 6 s (r + rho) D                          s: share of the rows that is sent
    exact      18 F D

Figures: relative squared error of the tokens' outputs (mean over layers), and the cost as a share of the exact experts'.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.clustering import Group, capture, hashed, trained
from benchmarks.common import table, write_result
from megatron_lsh import lsh
from megatron_lsh.lsh.blocks import block_widths
from megatron_lsh.lsh.cluster import Clusters
from megatron_lsh.lsh.interpolate import RIDGE
from megatron_lsh.moe.experts import row_width


def leading(x_BD: Tensor, directions: int | None) -> Tensor:
    """[D, r], orthonormal: a randomised range finder with one power iteration (Halko, Martinsson and Tropp 2011)."""
    width = x_BD.shape[1]
    if directions is None or directions >= min(x_BD.shape):
        return torch.eye(width)
    start = torch.randn(width, directions, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(x_BD.T @ (x_BD @ start))[0]


def restored(rows_ND: Tensor, sent_BD: Tensor, out_BD: Tensor, own_N: Tensor, r: int | None, rho: int | None) -> Tensor:
    """E(c) + f(x) - f(c) of one block; f in r dimensions of the rows and rho of the outputs (None: all)."""
    mean_D, centred_BD = sent_BD.mean(0), out_BD - out_BD.mean(0)
    basis_Dr = leading(sent_BD - mean_D, r)
    x_Nr, c_Br = (rows_ND - mean_D) @ basis_Dr, (sent_BD - mean_D) @ basis_Dr
    scale = 2 * c_Br.square().sum(1).mean().clamp(min=1e-20)
    around_NB = torch.exp(-torch.cdist(x_Nr, c_Br).square() / scale)
    among_BB = torch.exp(-torch.cdist(c_Br, c_Br).square() / scale)
    directions_Do = leading(centred_BD, rho)
    weights_Bo = torch.linalg.solve(among_BB + RIDGE * torch.eye(len(c_Br)), centred_BD @ directions_Do)
    return out_BD[own_N] + (around_NB - among_BB[own_N]) @ weights_Bo @ directions_Do.T


@torch.no_grad()
def error(group: Group, clusters: Clusters, exact_TD: Tensor, block: int, r: int | None, rho: int | None) -> float:
    """Of the tokens' outputs; blocks as lsh/blocks.py cuts them."""
    member_C = lsh.nearest_members(group.rows_ND, clusters)
    sent_CD = group.rows_ND[member_C]
    out_CD = group.outputs(sent_CD, clusters.counts_E)
    rows_out_ND, first = out_CD[clusters.cluster_N], 0
    for width in block_widths(clusters.counts_E.tolist(), block):
        inside_N = ((clusters.cluster_N >= first) & (clusters.cluster_N < first + width)).nonzero().squeeze(1)
        if width > 1:
            of_block = slice(first, first + width)
            own_N = clusters.cluster_N[inside_N] - first
            rows_out_ND[inside_N] = restored(
                group.rows_ND[inside_N], sent_CD[of_block], out_CD[of_block], own_N, r, rho
            )
        first += width
    rows_out_ND[member_C] = out_CD[clusters.cluster_N[member_C]]
    return float((group.tokens(rows_out_ND) - exact_TD).square().sum() / exact_TD.square().sum())


def cost(block: int, r: int | None, rho: int | None, hidden: int, width: int, rate: float) -> float:
    """Share of the exact experts' arithmetic."""
    full = 12.0 * block * hidden
    if r is not None and rho is not None:
        full = 6.0 * block * (r + rho) + (4 + 6 * rate) * (r + rho) * hidden
    return full / (18.0 * width * hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=1600, help="exact training before")
    parser.add_argument("--joined", type=int, default=4, help="micro-batches whose rows cluster together")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--blocks", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 32, 64], help="r = rho")
    parser.add_argument("--name", default="wide_fits", help="of the result file")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for pretrain_gpt_moe.py")
    arguments = parser.parse_args()
    with trained(arguments.iters, *arguments.flags) as (run, _):
        cfg, captured = run.cfg, capture(run, arguments.joined)
    hidden, width = row_width(cfg.model, cfg.moe), cfg.moe.moe_ffn_hidden_size or 0
    groups = []
    for layer in captured:
        x_TD, ids_TK, probs_TK = (
            torch.cat(parts)
            for parts in zip(*((x, routing.expert_ids_TK, routing.probs_TK) for _, x, routing in layer), strict=True)
        )
        groups.append(Group.of(layer[0][0], x_TD, ids_TK, probs_TK, cfg.moe.num_experts or 0))
    with torch.no_grad():
        clustered = [hashed()(group, arguments.rate) for group in groups]
        exact = [group.tokens(group.outputs(group.rows_ND, group.counts_E)) for group in groups]
    rows_per_group = statistics.mean(float(group.counts_E.double().mean()) for group in groups)
    results: list[dict[str, Any]] = []
    for block in arguments.blocks:
        for r in (None, *arguments.ranks):
            errors = [error(g, c, y, block, r, r) for g, c, y in zip(groups, clustered, exact, strict=True)]
            share = cost(block, r, r, hidden, width, arguments.rate)
            results.append({"block": block, "r": r, "share": share, "error": statistics.mean(errors), "layers": errors})
    lines = [[r["block"], r["r"] or "all", f"{r['share']:.1%}", f"{r['error']:.4f}"] for r in results]
    print(f"{rows_per_group:.0f} rows per group, D {hidden}, F {width}, {arguments.iters} iterations before\n")
    print(table(["representatives", "r = rho", "of the experts' arithmetic", "error"], lines))
    settings = {
        "iters": arguments.iters,
        "flags": arguments.flags,
        "rows_per_group": rows_per_group,
        "rate": arguments.rate,
    }
    print(f"wrote {write_result(arguments.name, settings | {'results': results})}")


if __name__ == "__main__":
    main()
