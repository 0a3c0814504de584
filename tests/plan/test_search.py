from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_lsh.commands import plan
from megatron_lsh.config import parse_args, validate
from megatron_lsh.errors import ConfigError
from megatron_lsh.families import GPT, T5
from megatron_lsh.parallel.layout import ParallelLayout
from megatron_lsh.plan.figures import by_bandwidth, by_ranks
from megatron_lsh.plan.search import Answer, Question, _validated, changes, named_in, search
from megatron_lsh.plan.table import command_line
from tests.plan.helpers import MODEL, cluster, document, parsed

BOUND = "--micro-batch-size 2 --use-distributed-optimizer --context-parallel-size 1"
"""what the small searches leave out"""


def question(words: str = BOUND, **changes: object) -> Question:
    cfg = parsed(words)
    return replace(Question(cfg, named_in(words.split(), type(cfg)), chunks=(1, 2)), **changes)  # type: ignore[arg-type]


LSH = {"row_ns": 33000}
"""a row through an expert takes 37 microseconds: LSH pays where the network is slow"""


@pytest.fixture(scope="module")
def answer() -> Answer:
    return search(question(), cluster(lsh=LSH))


def test_every_command_line_is_accepted_by_training_and_names_what_was_timed(answer: Answer) -> None:
    assert len(answer.candidates) > 30
    for candidate in answer.candidates[:: len(answer.candidates) // 25]:
        words = command_line(GPT, MODEL.split(), candidate, cluster())
        start = words.index("pretrain_gpt_moe") + 1
        cfg = validate(parse_args([*words[start:], *BOUND.split(), "--lr", "1e-3", "--train-iters", "1"]), 4)
        assert ParallelLayout.from_config(cfg.parallel, 4) == candidate.layout
        for section in ("parallel", "moe", "lsh", "recompute"):
            assert replace(getattr(cfg, section), **({"world_size": 4} if section == "parallel" else {})) == getattr(
                candidate.cfg, section
            )


def test_what_is_fixed_stays_and_the_fastest_come_first(answer: Answer) -> None:
    assert all(candidate.cfg.training.micro_batch_size == 2 for candidate in answer.candidates)
    assert all(low.seconds <= high.seconds for low, high in pairwise(answer.candidates))
    kinds = {(c.layout.tp, c.layout.pp, c.layout.ep) for c in answer.candidates}
    assert {(1, 1, 1), (2, 1, 4), (1, 2, 2), (2, 2, 1)} <= kinds and not any(tp == 4 for tp, _, _ in kinds)
    assert any(c.cfg.moe.moe_node_deduplication == "on" for c in answer.candidates)


def test_more_choices_are_never_worse_and_memory_holds_the_chosen(answer: Answer) -> None:
    exact = search(question(rates=()), cluster(lsh=LSH))
    assert exact.candidates[0].seconds >= answer.candidates[0].seconds
    assert all(candidate.exact for candidate in exact.candidates)
    finer = search(question(rates=("0.1", "0.2")), cluster(lsh=LSH))
    assert finer.candidates[0].seconds <= answer.candidates[0].seconds
    sizes = sorted(candidate.memory for candidate in exact.candidates)
    most = sizes[len(sizes) // 3]
    tight = search(question(rates=()), replace(cluster(), memory=most))
    assert tight.too_large > 0 and all(candidate.memory <= most for candidate in tight.candidates)
    with pytest.raises(ConfigError, match="the smallest layout takes"):
        search(question(rates=()), replace(cluster(), memory=1000.0))


def test_the_choice_changes_where_two_take_equally_long(answer: Answer) -> None:
    first, *rest = changes(answer.candidates)
    assert rest, "on a network 64 times as fast something else is best"
    before = first[1]
    for faster, after in rest:
        assert before.cost.at(faster).total == pytest.approx(after.cost.at(faster).total, rel=1e-6)
        assert min(c.cost.at(faster * 1.001).total for c in answer.candidates) <= before.cost.at(faster * 1.001).total
        before = after


def test_curves_fall_with_bandwidth_and_reach_16384_ranks(answer: Answer) -> None:
    for points in by_bandwidth(answer.candidates).values():
        assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    curves = by_ranks(answer.candidates[:1])
    ((ranks, times),) = [tuple(zip(*points, strict=True)) for points in curves.values()]
    assert ranks == tuple(4.0 * 2**n for n in range(13)) and times[0] == pytest.approx(
        1e3 * answer.candidates[0].seconds
    )
    assert list(times) == sorted(times)  # the same work per rank, and more to reduce


def test_a_dispatch_that_only_misses_memory_is_tried_with_recomputation() -> None:
    """More memory is never slower, and LSH is among what little memory leaves."""
    words = BOUND + " --expert-model-parallel-size 4 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
    on = cluster(across={"gbit_per_s": 0.01})
    every = search(question(words), on).candidates
    sizes = sorted({candidate.memory for candidate in every})
    times = []
    for memory in [*sizes, *((low + high) / 2 for low, high in pairwise(sizes))]:
        found = search(question(words), replace(on, memory=memory)).candidates
        times.append((memory, found[0].seconds, any(not candidate.exact for candidate in found)))
    seconds = [time for _, time, _ in sorted(times)]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) > 1 and all(lsh for *_, lsh in times)


def test_what_training_refuses_of_a_dispatch_is_no_candidate() -> None:
    words = BOUND + " --lsh-target-energy 0.05 --lsh-least-rate 0.3 --expert-model-parallel-size 4"
    asked = question(words, rates=("0.1", "0.5"))
    found = search(asked, cluster(lsh=LSH))
    assert found.refused > 0 and any(not candidate.exact for candidate in found.candidates)
    for candidate in found.candidates:
        _validated(asked.cfg, dict(candidate.settings), 4)


def test_a_rate_for_each_stack_of_a_t5() -> None:
    words = (
        "--encoder-num-layers 2 --decoder-num-layers 2 --hidden-size 32 --num-attention-heads 4 --encoder-seq-length 32 "
        "--decoder-seq-length 16 --num-experts 4 --moe-aux-loss-coeff 1e-2 --vocab-size 127 --mock-data "
        "--tokenizer-type NullTokenizer --global-batch-size 16 --expert-model-parallel-size 4 "
        "--tensor-model-parallel-size 1 --lsh-target-rate [0.1,0.5] " + BOUND
    )
    cfg = parse_args(words.split(), T5.config)
    found = search(Question(cfg, named_in(words.split(), type(cfg)), rates=("[0.1,0.5]",), chunks=(1,)), cluster())
    lsh = next(candidate for candidate in found.candidates if not candidate.exact)
    assert lsh.cfg.lsh.rates().at(0, 0) == 0.1 and lsh.cfg.lsh.rates().at(3, 0) == 0.5


def test_pages_of_clusters_at_both_ends(answer: Answer, tmp_path: Path) -> None:
    """More ranks than the last point of the axis; and one node, of whose network nothing is known."""
    assert [len(points) for points in by_ranks(answer.candidates[:1], most=2).values()] == [1]
    alone = document(nodes=1)
    del alone["across"]
    (tmp_path / "one.yaml").write_text(json.dumps(alone))
    words = [*MODEL.split(), *BOUND.split(), "--cluster", str(tmp_path / "one.yaml"), "--out", str(tmp_path)]
    assert plan.main(words) == 0 and "Step time and ranks" not in (tmp_path / "plan.html").read_text()


def test_flags_of_a_dry_run_leave_nothing_behind() -> None:
    words = "--dry-run true --world-size 8 --lr 1 --dry-run-json --bf16 --world-size=4 --dry-run=false"
    assert plan.without_own(words.split()) == ["--lr", "1", "--bf16"]


def test_a_training_that_nothing_fits_says_why() -> None:
    with pytest.raises(ConfigError, match="num_attention_heads"):
        search(question(BOUND + " --tensor-model-parallel-size 2 --num-attention-heads 3 --kv-channels 8"), cluster())


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster.yaml").write_text(json.dumps(document(name="two <b>nodes</b>", lsh=LSH)))
    words = [
        *MODEL.split(),
        *BOUND.split(),
        "--cluster",
        str(tmp_path / "cluster.yaml"),
        "--tensor-model-parallel-size",
        "1",
    ]
    assert plan.main([*words, "--out", str(tmp_path), "--top", "3", "--chunks", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A MODEL, NOT A MEASUREMENT") and " 3. " in out and "The fastest by bandwidth" in out
    command = shlex.split(next(line for line in out.splitlines() if "torchrun" in line))
    assert command[:3] == ["torchrun", "--nnodes", "2"] and "--cluster" not in command and "--dry-run" not in command
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 3 and "<script" not in page and "<b>nodes" not in page and "http" not in page
    assert page.count("model, not measured") == 1 and "16.4k" in page
    assert plan.main([*words[:-2], "--global-batch-size", "7"]) == 1
    assert plan.main([word for word in words if word not in ("--global-batch-size", "16")]) == 1
    assert "global_batch_size (absent) must be given" in capsys.readouterr().err
