from __future__ import annotations

import pytest

from megatron_lsh.errors import ConfigError
from tests.plan.helpers import cluster, cost

MS = 1e-3
TOKENS = 32
"""of a micro-batch of one sample"""
DENSE = 6 * TOKENS * (2 * (32 * 96 + 32 * 32 + 2 * 32 * 16 + 32 * 4) + 32 * 128) / 1e9
"""seconds of a micro-batch: attention and router of two layers, and the vocabulary"""
EXPERTS = 6 * TOKENS * 2 * 2 * 3 * 32 * 64 / 1e9
HELD = 128 * 32 + 32 * 32 + 2 * (4 * 32 * 32 + 2 * 32 + 4 * 32) + 32
"""dense parameters: vocabulary, positions, two layers, the last norm"""
OF_EXPERT = 3 * 32 * 64
HOP = 2 * 2 * 16 * 128 / 125e6
"""two ranks of a node send 16 rows of 32 numbers to each of two ranks of the other node"""
TOLD = 2 * 2 * 2 * 8 * 4 / 125e6
"""and before that two counts for each of four experts"""
SMALL = 64 / 125e6


def dense_reduction(ranks: int = 4) -> float:
    return 2 * (ranks - 1) / ranks * 4 * HELD / 125e6


def test_exact_dispatch_by_hand() -> None:
    time = cost("--expert-model-parallel-size 4 --micro-batch-size 1 --moe-node-deduplication off", cluster()).at()
    assert time.compute == pytest.approx(4 * (DENSE + EXPERTS))
    assert time.network == pytest.approx(4 * 2 * (4 * HOP + TOLD) + dense_reduction() + SMALL)
    assert (time.node_links, time.bubble) == (0.0, 0.0) and time.limit == "compute"
    assert time.total == pytest.approx(time.compute + time.network)


def test_lsh_sends_and_computes_its_share_and_costs_its_time() -> None:
    words = (
        "--expert-model-parallel-size 4 --micro-batch-size 1 --moe-token-dispatcher-type lsh --lsh-target-rate 0.25 "
    )
    on = cluster(lsh={"row_ns": 1000})
    time = cost(words + "--lsh-scope rank", on).at()  # 4 of the 16 rows of an expert
    assert time.compute == pytest.approx(4 * (DENSE + EXPERTS / 4 + 2 * 64 * 1e-6))
    assert time.network == pytest.approx(4 * 2 * (HOP + TOLD) + dense_reduction() + SMALL)
    # A node's rows for the other node cluster; half of all stay on their node and are not.
    time = cost(words + "--lsh-scope node", on).at()
    assert time.compute == pytest.approx(4 * (DENSE + EXPERTS * 5 / 8 + 2 * 32 * 1e-6))
    assert time.network == pytest.approx(4 * 2 * (HOP + TOLD) + dense_reduction() + SMALL)
    slow = cost(words + "--lsh-scope node", cluster(across={"gbit_per_s": 1, "hop_efficiency": 0.5})).at()
    assert slow.network == pytest.approx(4 * 2 * (2 * HOP + TOLD) + dense_reduction() + SMALL)
    inside = 32 * 128 / 1e9
    """of two hops, each way: half of a rank's rows go to the other rank"""
    assert time.node_links == pytest.approx(4 * 2 * 4 * inside)


def test_a_de_duplicated_token_crosses_once_with_its_weights() -> None:
    words = "--expert-model-parallel-size 4 --micro-batch-size 1 --moe-node-deduplication on"
    time = cost(words, cluster()).at()
    crossing = 2 * 32 * 0.75 * (128 + 8) / 125e6  # of two experts one is on the other node with probability 3/4
    assert time.network == pytest.approx(4 * 2 * (4 * crossing + TOLD) + dense_reduction() + SMALL)
    assert time.node_links == pytest.approx(4 * 2 * 4 * 32 * 128 / 1e9)


def test_experts_on_every_rank_are_reduced_and_sharded_parameters_gathered() -> None:
    words = "--expert-model-parallel-size 1 --micro-batch-size 1"
    time = cost(
        words, cluster(compute={"dense_tflops": 1e-3, "grouped_tflops": 1e-3, "optimizer_gparams_per_s": 1e-3})
    ).at()
    held = HELD + 2 * 4 * OF_EXPERT
    assert time.network == pytest.approx(2 * 3 / 4 * 4 * held / 125e6 + SMALL)
    assert time.compute == pytest.approx(4 * (DENSE + EXPERTS) + held / 1e6)
    sharded = cost(words + " --use-distributed-optimizer --bf16", cluster()).at()
    assert sharded.network == pytest.approx(3 / 4 * (4 + 2) * held / 125e6 + SMALL)


def test_a_pipeline_waits_and_where_stages_share_a_processor_it_does_not() -> None:
    words = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 1"
    time = cost(words, cluster()).at()  # 8 micro-batches, the second stage has the vocabulary
    stage = DENSE / 2 + 6 * TOKENS * 32 * 128 / 1e9 / 2 + EXPERTS / 2
    rows, hidden = 2 * 32 * 128 / 2 / 1e9, 2 * 2 * 32 * 32 * 4 / 125e6
    told = 2 * 8 * 4 / 1e9
    assert time.compute == pytest.approx(8 * stage, rel=1e-6)
    held = 128 * 32 + 32 * 32 + 4 * 32 * 32 + 2 * 32 + 4 * 32  # of the first stage, on two ranks of a node
    assert time.node_links == pytest.approx(8 * (4 * rows + told) + 4 * held / 1e9, rel=1e-6)
    assert time.network == pytest.approx(4 * hidden + SMALL, rel=1e-6)  # half is hidden behind the other micro-batch
    assert time.bubble == pytest.approx(stage + 4 * rows + told, rel=1e-6)  # (p - 1) micro-batches
    quick = cost(words, cluster(across={"gbit_per_s": 1, "send_efficiency": 2})).at()
    assert quick.network == pytest.approx(2 * hidden + SMALL, rel=1e-6)
    shared = cluster(compute={"dense_tflops": 1e-3, "grouped_tflops": 1e-3, "ranks_per_processor": 2})
    assert cost(words, shared).at().bubble == 0.0


@pytest.mark.parametrize(
    "words",
    [
        "--expert-model-parallel-size 4 --moe-overlap-chunks 4",
        "--expert-model-parallel-size 4 --moe-node-deduplication on --moe-overlap-chunks 2",
        "--expert-model-parallel-size 4 --moe-token-dispatcher-type lsh --lsh-wire-dtype int4 --recompute-granularity full",
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --moe-shared-expert-intermediate-size 64 "
        "--moe-shared-expert-overlap",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 1",
        "--context-parallel-size 4 --use-distributed-optimizer",
    ],
)
def test_more_of_anything_is_never_slower(words: str) -> None:
    """Bandwidth, speed, and the share of reductions that is hidden; and a larger slowdown or imbalance is never faster."""
    words += " --micro-batch-size 1"
    curved = {"alltoall_us": [[1000, 30], [10000, 60], [100000, 400]]}
    for on in (cluster(), cluster(across=curved)):
        priced = cost(words, on)
        times = [round(priced.at(2.0**n).total, 12) for n in range(-8, 9)]
        assert times == sorted(times, reverse=True)

    def total(**changes: object) -> float:
        return cost(words, cluster(**changes)).at().total

    usual = total()
    assert total(compute={"dense_tflops": 2e-3, "grouped_tflops": [[1, 1e-3], [64, 2e-3]]}) <= usual
    assert total(overlap={"hidden_reduction": 0.5}) <= usual <= total(routing={"max_over_mean": 1.5})
    assert total(overlap={"slowdown": 1.5}) >= usual
    assert total(across={"gbit_per_s": 1, "oversubscription": 3}) >= usual


def test_a_schedule_costs_what_its_last_rate_costs() -> None:
    words = "--expert-model-parallel-size 4 --micro-batch-size 1 --moe-token-dispatcher-type lsh --lsh-target-rate "
    assert cost(words + "1.0,0.25@10", cluster()).at() == cost(words + "0.25", cluster()).at()


def test_sends_over_switches_are_oversubscribed() -> None:
    words = "--pipeline-model-parallel-size 8 --num-layers 8 --micro-batch-size 1"

    def total(oversubscription: float) -> float:
        across = {"gbit_per_s": 1, "oversubscription": oversubscription, "nodes_per_switch": 2}
        return cost(words, cluster(nodes=8, ranks_per_node=1, across=across)).at().network

    assert total(1) == pytest.approx(total(2)) and total(64) > 10 * total(1)


def test_numbers_of_the_wire_cost_what_their_kind_costs() -> None:
    words = "--expert-model-parallel-size 4 --micro-batch-size 1 --moe-node-deduplication off --lsh-wire-dtype "
    on = cluster(dispatch={"casting_gb_per_s": 4, "coding_gb_per_s": 1})
    coded = 4 * 2 * 64 * 8 * 128  # bytes: 64 rows, of a layer four all-to-alls, encoded and decoded
    for name, speed in (("bf16", 4e9), ("fp8", 1e9), ("int4", 1e9)):
        time = cost(words + name, on).at()
        assert time.compute == pytest.approx(4 * (DENSE + EXPERTS) + coded / speed)


def test_pieces_hide_the_shorter_of_travel_and_experts() -> None:
    def experts_and_travel(pieces: int) -> float:
        words = "--expert-model-parallel-size 4 --micro-batch-size 1 --moe-node-deduplication off"
        return cost(f"{words} --moe-overlap-chunks {pieces}", cluster()).at().total

    # Forward a third of the experts, backward two thirds; two hops each: (T + X / 4) or (X + T / 4), whichever is longer.
    experts, travel = [EXPERTS / 2 / 3, EXPERTS / 3], 2 * HOP
    hidden = sum(x + travel - max(travel + x / 4, x + travel / 4) for x in experts)
    assert experts_and_travel(1) - experts_and_travel(4) == pytest.approx(4 * 2 * hidden)


def test_a_dispatch_that_the_layout_cannot_have_is_refused_as_in_training() -> None:
    with pytest.raises(ConfigError, match="must have expert parallel groups that span several nodes"):
        cost(
            "--expert-model-parallel-size 2 --micro-batch-size 1 --moe-token-dispatcher-type lsh --lsh-scope node",
            cluster(),
        )
