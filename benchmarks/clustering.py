"""Ways of clustering on equal footing: how far rows are from their centroids, what it does to outputs, what it costs.

    python -m benchmarks.clustering

Trains the model of benchmarks/quality.py exactly, takes the rows that reach each of its MoE layers in some micro-batches,
and clusters them in every way at the same rate. Five figures, medians over layers and micro-batches:

    energy         sum |x - c|^2 / sum |x|^2
    none           error of a token's output with E(c) in place of E(x): sum |y' - y|^2 / sum |y|^2, y = sum_k p_k E_k(x)
    identity       the same with E(c) + x - c
    interpolate    the same with --lsh-residual interpolate (a member of each cluster in the place of its mean)
    ms             finding the clusters, one thread (kernels where they are built)

Some ideas are not in the framework because of what is measured here; their code is below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import DATA_FLAGS, progress, table, write_result
from benchmarks.dispatchers import hadamard_rotation, random_seed_clusters
from benchmarks.quality import MODEL
from megatron_lsh import lsh
from megatron_lsh.config import Config, parse_args, validate
from megatron_lsh.data.loader import BatchIterator
from megatron_lsh.families import GPT
from megatron_lsh.lsh import Clusters, cluster_sizes, expert_of_row
from megatron_lsh.lsh.interpolate import interpolate
from megatron_lsh.moe.experts import Experts, Feed
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.moe.permute import Permutation, permute, unpermute
from megatron_lsh.moe.router import Routing, TopKRouter
from megatron_lsh.parallel.initialize import initialize, shutdown
from megatron_lsh.training.run import Run, set_up


@dataclass
class Group:
    """What one MoE layer does with some tokens, and what clustering may look at."""

    experts: Callable[[Feed], Tensor]
    rows_ND: Tensor
    counts_E: Tensor
    probs_TK: Tensor
    permutation: Permutation
    prob_N: Tensor

    @staticmethod
    def of(
        experts: Callable[[Feed], Tensor], x_TD: Tensor, ids_TK: Tensor, probs_TK: Tensor, num_experts: int
    ) -> Group:
        rows_ND, counts_E, permutation = permute(x_TD, ids_TK, num_experts, num_rows=ids_TK.numel())
        prob_N = torch.empty(rows_ND.shape[0])
        prob_N[permutation.row_of_TK] = probs_TK.float()
        return Group(experts, rows_ND, counts_E, probs_TK, permutation, prob_N)

    def outputs(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return self.experts(Feed(rows_ND, counts_E.cpu()))

    def tokens(self, rows_out_ND: Tensor) -> Tensor:
        return unpermute(rows_out_ND, self.probs_TK, self.permutation)


Method = Callable[[Group, float], Clusters]


def hashed(
    num_hashes: int = 6, width: int = 16, steps: int = 1, rotation: Callable[..., Tensor] | None = None
) -> Method:
    """Budgets by common prefix, then refinement: the framework's own method."""

    def method(group: Group, rate: float) -> Clusters:
        hidden = group.rows_ND.shape[1]
        if rotation is None:
            rotation_DQW = lsh.make_rotation(hidden, num_hashes, width, seed=1)
        else:
            rotation_DQW = rotation(hidden, num_hashes, width, torch.Generator().manual_seed(1))
        budgets_E = lsh.row_budgets(group.counts_E, rate)
        return _hashed(group, rotation_DQW, num_hashes, budgets_E, steps)

    return method


def _hashed(group: Group, rotation_DQW: Tensor, num_hashes: int, budgets_E: Tensor, steps: int) -> Clusters:
    projection_NP = lsh.project(group.rows_ND, rotation_DQW)
    clusters = lsh.cluster_projection(projection_NP, group.counts_E, budgets_E, int(budgets_E.sum()), num_hashes)
    return lsh.refine(group.rows_ND, clusters, group.counts_E, steps)


def random_seeds(steps: int) -> Method:
    """The nearest of random rows, then refinement."""
    return lambda group, rate: random_seed_clusters(group.rows_ND, group.counts_E, rate, steps)


def bucket(group: Group, rate: float) -> Clusters:
    """The paper's: the rate comes out as it does."""
    codes_NQ = lsh.hash_rows(group.rows_ND, lsh.make_rotation(group.rows_ND.shape[1], 2, 8, seed=1), 2)
    return lsh.cluster_by_code(codes_NQ, group.counts_E, num_codes=16)


def outliers_alone(share: float) -> Method:
    """This share of the budget goes to the rows farthest from their centroids, each sent as it is."""

    def method(group: Group, rate: float) -> Clusters:
        clusters = hashed()(group, rate * (1 - share))
        alone_E = lsh.row_budgets(group.counts_E, rate) - clusters.counts_E
        distance_N = _distances(group, clusters)
        expert_N = expert_of_row(group.counts_E, group.rows_ND.shape[0])
        order_N = torch.argsort(distance_N, descending=True)
        order_N = order_N[torch.argsort(expert_N[order_N], stable=True)]
        rank_N = torch.arange(order_N.shape[0]) - (group.counts_E.cumsum(0) - group.counts_E)[expert_N]
        rows_A = order_N[rank_N < alone_E[expert_N]]
        # New clusters behind the old ones, then numbered expert by expert; those that lost all rows stay empty.
        total = clusters.num_clusters + rows_A.shape[0]
        cluster_N = clusters.cluster_N.clone()
        cluster_N[rows_A] = torch.arange(clusters.num_clusters, total)
        expert_C = torch.cat([expert_of_row(clusters.counts_E, clusters.num_clusters), expert_N[rows_A]])
        number_C = torch.empty(total, dtype=torch.int64)
        number_C[torch.argsort(expert_C, stable=True)] = torch.arange(total)
        cluster_N = number_C[cluster_N]
        return Clusters.from_assignment(cluster_N, cluster_sizes(cluster_N, total), clusters.counts_E + alone_E)

    return method


def water_filling(group: Group, rate: float) -> Clusters:
    """The layer's budget is shared by the experts' distortion at equal rates instead of by their rows."""
    clusters = hashed()(group, rate)
    expert_N = expert_of_row(group.counts_E, group.rows_ND.shape[0])
    # D(B) ~ B^-a with a near 1/2 in these tables, so that dD/dB is equal at B ~ D^(1 / (1 + a)).
    distortion_E = torch.zeros(len(group.counts_E)).index_add_(0, expert_N, _distances(group, clusters)).pow(2 / 3)
    budgets_E = (distortion_E / distortion_E.sum() * clusters.num_clusters).long()
    budgets_E = budgets_E.clamp(min=1).minimum(group.counts_E)
    rotation_DQW = lsh.make_rotation(group.rows_ND.shape[1], 6, 16, seed=1)
    return _hashed(group, rotation_DQW, 6, budgets_E, 1)


def weighted_assignment(group: Group, rate: float) -> Clusters:
    """Rows of small routing weight count less: clusters of p x instead of x, as seeds for one refinement."""
    scaled = Group(
        group.experts, group.rows_ND * group.prob_N.unsqueeze(1), group.counts_E, group.probs_TK, group.permutation,
        group.prob_N,
    )  # fmt: skip
    return hashed()(scaled, rate)


def _distances(group: Group, clusters: Clusters) -> Tensor:
    centroids_CD, _ = lsh.compress(group.rows_ND, clusters, with_residual=False)
    return (group.rows_ND - centroids_CD[clusters.cluster_N]).square().sum(1)


METHODS: dict[str, Method] = {
    "budget (default)": hashed(),
    "unrefined": hashed(steps=0),
    "refined twice": hashed(steps=2),
    "refined 3 times": hashed(steps=3),
    "random seeds": random_seeds(1),
    "random seeds, refined once": random_seeds(2),
    "k-means, 10 rounds": random_seeds(10),
    "paper's buckets": bucket,
    **{f"q {q}, w 16": hashed(num_hashes=q) for q in (1, 2, 4, 10)},
    **{f"q 6, w {w}": hashed(width=w) for w in (4, 8, 64)},
    "hyperplanes (24)": hashed(24, 1),
    "hyperplanes (24), unrefined": hashed(24, 1, 0),
    "Hadamard rotations": hashed(rotation=hadamard_rotation),
    "Hadamard rotations, unrefined": hashed(steps=0, rotation=hadamard_rotation),
    "outliers alone, 10%": outliers_alone(0.1),
    "outliers alone, 50%": outliers_alone(0.5),
    "budgets by distortion": water_filling,
    "weighted by probability": weighted_assignment,
}


@torch.no_grad()
def evaluate(
    group: Group, method: Method, rate: float, weighted_means: bool = False, **settings: Any
) -> dict[str, float]:
    """One method on one group; `settings` are those of interpolate()."""
    started = time.perf_counter()
    clusters = method(group, rate)
    ms = 1e3 * (time.perf_counter() - started)
    if weighted_means:
        weight_N = group.prob_N + 1e-6
        total_CD, total_C = (
            torch.zeros(clusters.num_clusters, group.rows_ND.shape[1]),
            torch.zeros(clusters.num_clusters),
        )
        total_CD.index_add_(0, clusters.cluster_N, group.rows_ND * weight_N.unsqueeze(1))
        centroids_CD = total_CD / total_C.index_add_(0, clusters.cluster_N, weight_N).clamp(min=1e-9).unsqueeze(1)
    else:
        centroids_CD, _ = lsh.compress(group.rows_ND, clusters, with_residual=False)
    residual_ND = group.rows_ND - centroids_CD[clusters.cluster_N]
    exact_TD = group.tokens(group.outputs(group.rows_ND, group.counts_E))
    none_ND = group.outputs(centroids_CD, clusters.counts_E)[clusters.cluster_N]

    def error(rows_out_ND: Tensor) -> float:
        return float((group.tokens(rows_out_ND) - exact_TD).square().sum() / exact_TD.square().sum())

    member_C = None if weighted_means else lsh.nearest_members(group.rows_ND, clusters)
    points_CD = centroids_CD if member_C is None else group.rows_ND[member_C]
    at_points_CD = group.outputs(points_CD, clusters.counts_E)
    restored_ND = interpolate(at_points_CD, group.rows_ND, points_CD, clusters, member_C, **settings)
    return {
        "rate": clusters.num_clusters / clusters.num_rows,
        "energy": float(residual_ND.square().sum() / group.rows_ND.square().sum()),
        "none": error(none_ND),
        "identity": error(none_ND + residual_ND),
        "interpolate": error(restored_ND),
        "ms": ms,
    }


@contextmanager
def running(words: Iterable[object]) -> Iterator[tuple[Run, BatchIterator]]:
    """A run of this process with these flags, and its batches."""
    cfg: Config = validate(parse_args(list(map(str, words))), 1)
    run = set_up(cfg, GPT, initialize(cfg.parallel, moe=True))
    with run.batches("train") as batches:
        yield run, batches
    shutdown(run.ctx)


def training(iters: int, *flags: object) -> AbstractContextManager[tuple[Run, BatchIterator]]:
    """The model of benchmarks/quality.py before exact training, and its batches."""
    return running([*MODEL, *DATA_FLAGS, "--train-iters", iters, "--eval-iters", 24, "--seed", 1, *flags])


@contextmanager
def trained(iters: int, *flags: object) -> Iterator[tuple[Run, BatchIterator]]:
    """The same after it, and the batches that follow."""
    with training(iters, *flags) as (run, batches):
        began = time.monotonic()
        for iteration in range(iters):
            run.step(batches, iteration, stop=False)
            if (iteration + 1) % 50 == 0:
                progress(iteration + 1, iters, began, "training")
        yield run, batches


def capture(run: Run, micro_batches: int) -> list[list[tuple[Experts, Tensor, Routing]]]:
    """Per MoE layer and micro-batch of the validation set: its experts, the tokens they get, and where they go."""
    layers = [module for module in run.model.modules() if isinstance(module, MoELayer)]
    found: list[list[tuple[Experts, Tensor, Routing]]] = [[] for _ in layers]

    def keep(number: int) -> Callable[[TopKRouter, Any, Routing], None]:
        return lambda router, inputs, routing: found[number].append((layers[number].experts, inputs[0], routing))

    hooks = [layer.router.register_forward_hook(keep(number)) for number, layer in enumerate(layers)]
    run.model.eval()
    with torch.no_grad(), run.batches("valid") as batches:
        for _ in range(micro_batches):
            run.step.forward_step(run.model, next(batches))
    for hook in hooks:
        hook.remove()
    return found


def measure(
    found: list[list[tuple[Experts, Tensor, Routing]]], rates: list[float], joined: int
) -> list[dict[str, Any]]:
    """All methods at the first rate, the default at every rate, and on several micro-batches at once."""
    experts = found[0][0][0]
    num_experts = int(experts.linear_fc1.weight.shape[0])
    groups = [Group.of(e, x, r.expert_ids_TK, r.probs_TK, num_experts) for layer in found for e, x, r in layer]
    large = []
    for layer in found:
        parts = layer[:joined]
        x_TD, ids_TK, probs_TK = (
            torch.cat(tensors)
            for tensors in ([x for _, x, _ in parts], [r.expert_ids_TK for *_, r in parts], [r.probs_TK for *_, r in parts])
        )  # fmt: skip
        large.append(Group.of(layer[0][0], x_TD, ids_TK, probs_TK, num_experts))
    default = METHODS["budget (default)"]
    cases: list[tuple[str, Method, list[Group], float, dict[str, Any]]] = [
        (name, method, groups, rates[0], {}) for name, method in METHODS.items()
    ]
    cases.append(("means weighted by probability", default, groups, rates[0], {"weighted_means": True}))
    cases.append((f"{joined} micro-batches together", default, large, rates[0], {}))
    for block in (32, 64, 1024):
        cases.append((f"interpolation's block {block}", default, groups, rates[0], {"block": block}))
        cases.append((f"{joined} micro-batches together, block {block}", default, large, rates[0], {"block": block}))
    for width in (0.25, 0.5, 2.0, 4.0):
        cases.append((f"interpolation's width {width:g}", default, groups, rates[0], {"width": width}))
    for ridge in (0.001, 0.003, 0.03, 0.1):
        cases.append((f"interpolation's ridge {ridge:g}", default, groups, rates[0], {"ridge": ridge}))
    for rate in rates[1:]:
        for name in ("budget (default)", "unrefined", "random seeds", "k-means, 10 rounds"):
            cases.append((name, METHODS[name], groups, rate, {}))
    results, started = [], time.monotonic()
    for number, (name, method, over, rate, settings) in enumerate(cases):
        evaluate(over[0], method, rate, **settings)  # first call
        figures = [evaluate(group, method, rate, **settings) for group in over]
        results.append(
            {"method": name, "wanted_rate": rate}
            | {key: statistics.median(f[key] for f in figures) for key in figures[0]}
            | {"range": {key: [min(f[key] for f in figures), max(f[key] for f in figures)] for key in figures[0]}}
        )
        progress(number + 1, len(cases), started, f"{name} at {rate:g}")
    return results


COLUMNS = ("energy", "none", "identity", "interpolate")


def report(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            r["method"], f"{100 * r['rate']:.1f}%", *(f"{r[key]:.3f} ({r['range'][key][0]:.3f}-{r['range'][key][1]:.3f})"
                                                      for key in COLUMNS), f"{r['ms']:.1f}",
        )
        for r in results
    ]  # fmt: skip
    return table(("method", "rows sent", "energy", "output error, none", "identity", "interpolate", "ms"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=300, help="exact training before")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--joined", type=int, default=4, help="micro-batches clustered together in one of the cases")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.2, 0.1, 0.5])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with trained(arguments.iters) as (run, _):
        results = measure(capture(run, arguments.micro_batches), arguments.rates, arguments.joined)
    print(f"\n{report(results)}\n\nwrote {write_result('clustering', {'results': results})}")


if __name__ == "__main__":
    main()
