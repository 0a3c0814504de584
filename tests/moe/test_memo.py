"""The memo of activation recomputation."""

import torch

from megatron_lsh.moe.layer_pass import LayerPass, LayerRecord, ReplayMemo


def test_the_second_pass_with_a_memo_is_a_replay_that_finds_what_the_first_decided():
    record, memo = LayerRecord(1, torch.device("cpu"), set()), ReplayMemo()
    first = LayerPass(record, memo)
    first.decided["a"] = None
    assert not first.replay
    for _ in range(2):
        again = LayerPass(record, memo)
        assert again.replay and "a" in again.decided and again.decided["a"] is None
    assert not LayerPass(record, ReplayMemo()).replay and not LayerPass(record).replay


def test_what_is_deferred_runs_once_while_rows_travel_or_when_it_is_wanted():
    p, calls = LayerPass(LayerRecord(1, torch.device("cpu"), set())), []
    early, late = (p.defer(lambda name=name: calls.append(name) or name) for name in ("early", "late"))
    assert late() == "late" and calls == ["late"]
    p.run_deferred()
    assert calls == ["late", "early"] and early() == "early" and late() == "late" and calls == ["late", "early"]
