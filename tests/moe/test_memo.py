"""The memo of activation recomputation."""

from megatron_lsh.moe.memo import ReplayMemo


def test_recall_computes_once_per_key():
    memo, calls = ReplayMemo(), []
    for _ in range(3):
        assert memo.recall("a", lambda: calls.append("a") or len(calls)) == 1
    assert memo.recall("b", lambda: None) is None
    assert memo.recall("b", lambda: calls.append("b")) is None
    assert calls == ["a"]


def test_replaying_from_the_second_pass_on():
    memo = ReplayMemo()
    assert [memo.replaying("x"), memo.replaying("y"), memo.replaying("x"), memo.replaying("x")] == [
        False,
        False,
        True,
        True,
    ]
