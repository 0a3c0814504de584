"""What the planner prints: the best candidates, what limits each, where the choice changes, and a command line."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lsh.families import Family
from megatron_lsh.plan.cluster import Cluster
from megatron_lsh.plan.cost_model import gbit
from megatron_lsh.plan.memory import GIB
from megatron_lsh.plan.search import Answer, Candidate, changes
from megatron_lsh.plan.step_time import LIMITS, StepTime


def layout_words(candidate: Candidate) -> str:
    """``TP 2, EP 8, DP 16, micro-batch 4, full recomputation``"""
    layout, cfg = candidate.layout, candidate.cfg
    sizes = [("TP", layout.tp), ("PP", layout.pp), ("CP", layout.cp), ("EP", layout.ep), ("DP", layout.dp)]
    words = [f"{name} {size}" for name, size in sizes if size > 1]
    words.append(f"micro-batch {cfg.training.micro_batch_size}")
    granularity = cfg.recompute.recompute_granularity
    words += [f"{granularity} recomputation"] if granularity else []
    words += ["sharded optimizer"] if cfg.parallel.use_distributed_optimizer else []
    return ", ".join(words)


def dispatch_words(candidate: Candidate) -> str:
    """``LSH 20% per node, fp8, 2 pieces``"""
    moe, lsh = candidate.cfg.moe, candidate.cfg.lsh
    if moe.num_experts is None:
        return "no experts"
    if candidate.layout.ep == 1:
        return "no row travels"
    if moe.moe_token_dispatcher_type == "lsh":
        least, most = lsh.rates().span()
        rate = f"{100 * least:g}%" if least == most else f"{100 * least:g}-{100 * most:g}%"
        words = [f"LSH {rate}" + (f" per {lsh.lsh_scope}" if lsh.lsh_scope else "")]
    elif moe.moe_token_dispatcher_type == "alltoall":
        words = ["de-duplicated" if moe.moe_node_deduplication == "on" else "exact"]
    else:
        words = [moe.moe_token_dispatcher_type]
    words += [lsh.lsh_wire_dtype] if lsh.lsh_wire_dtype else []
    words += [f"{moe.moe_overlap_chunks} pieces"] if moe.moe_overlap_chunks > 1 else []
    return ", ".join(words)


def kind_words(candidate: Candidate) -> str:
    """Its dispatch without the number of pieces."""
    return ", ".join(word for word in dispatch_words(candidate).split(", ") if not word.endswith(" pieces"))


def distinct(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """The first ones, each once; and the fastest exact one, if none of them is."""
    found: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        if len(found) == most:
            break
        found.setdefault((layout_words(candidate), dispatch_words(candidate)), candidate)
    best = list(found.values())
    exact = next((candidate for candidate in candidates if candidate.exact), None)
    return best if exact is None or exact in best or len(best) < most else [*best, exact]


def report(answer: Answer, cluster: Cluster, most: int = 10) -> str:
    """For people."""
    best = distinct(answer.candidates, most)
    lines = [
        *model_notes(answer, cluster),
        "",
        f"{'':3} {'ms':>9} {'compute':>8} {'network':>8} {'links':>6} {'bubble':>7} {'GiB':>7}  {'limited by':<18} "
        "layout; dispatch",
    ]
    for number, candidate in enumerate(best, 1):
        time = candidate.cost.at()
        shares = [seconds / time.total for _, seconds in parts(time)]
        lines.append(
            f"{number:>2}. {1e3 * time.total:>9.1f} {shares[0]:>8.0%} {shares[1]:>8.0%} {shares[2]:>6.0%} {shares[3]:>7.0%} "
            f"{candidate.memory / GIB:>7.1f}  {candidate.limit:<18} {layout_words(candidate)}; {dispatch_words(candidate)}"
        )
    lines += ["", *change_lines(answer.candidates, cluster)]
    return "\n".join(lines)


def parts(time: StepTime) -> list[tuple[str, float]]:
    """Seconds by what they go to."""
    return list(zip(LIMITS, (time.compute, time.network, time.node_links, time.bubble), strict=True))


def model_notes(answer: Answer, cluster: Cluster) -> list[str]:
    """What the figures are, and are not."""
    ranks = f"{cluster.nodes} x {cluster.ranks_per_node} ranks"
    notes = [
        f"A MODEL, NOT A MEASUREMENT: time per step on {cluster.name}, {ranks} (speeds: {cluster.source}).",
        f"{len(answer.candidates)} candidates; {answer.refused} refused by the checks of training, {answer.too_large} too "
        "large for memory.",
    ]
    if not all(candidate.exact for candidate in answer.candidates):
        notes.append("Time is compared, not loss: LSH and narrow numbers cost loss (docs/results.md).")
    return notes


def change_lines(candidates: Sequence[Candidate], cluster: Cluster) -> list[str]:
    """At which bandwidth between nodes another candidate becomes the fastest."""
    if cluster.nodes == 1:
        return []
    here = cluster.across.bandwidth
    (_, slowest), *rest = changes(candidates)
    if not rest:
        return [
            f"The first one is the fastest at every bandwidth from {gbit(here / 64)} to {gbit(here * 64)} per node."
        ]
    lines = [f"The fastest by bandwidth of a node, which is {gbit(here)} (anything else: model):"]
    lines.append(f"  below {gbit(rest[0][0] * here):>14}: {layout_words(slowest)}; {dispatch_words(slowest)}")
    for faster, candidate in rest:
        lines.append(f"  from  {gbit(faster * here):>14}: {layout_words(candidate)}; {dispatch_words(candidate)}")
    return lines


def command_line(family: Family, flags: Sequence[str], candidate: Candidate, cluster: Cluster) -> list[str]:
    """What starts a candidate; on several nodes it is run on each, with the first one's name for HOST."""
    words = ["torchrun"]
    if cluster.nodes > 1:
        words += ["--nnodes", str(cluster.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    words += ["--nproc-per-node", str(cluster.ranks_per_node), "-m", "megatron_lsh", f"pretrain_{family.name}_moe"]
    return [*words, *flags, *candidate.flags()]
