"""Auxiliary losses against their formulas, written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lsh.moe.balancing import LoadShare, count_experts, load_balancing_loss, load_share, sum_over, z_loss
from megatron_lsh.parallel.context import Group

ALONE = Group(None, 1, 0, (0,))


def switch_loss(scores: Tensor, ids: Tensor) -> Tensor:
    """E * sum_i f_i P_i over the given tokens."""
    num_experts, rows = scores.shape[1], ids.numel()
    total = torch.zeros((), dtype=scores.dtype)
    for i in range(num_experts):
        f = sum(int(e == i) for e in ids.flatten().tolist()) / rows
        p = sum(scores[t, i] for t in range(len(scores))) / len(scores)
        total = total + num_experts * f * p
    return total


def share_of(ids: Tensor, num_experts: int, kind: str, batch: int = 1, running: Tensor | None = None) -> LoadShare:
    running = torch.zeros(num_experts, dtype=torch.int64) if running is None else running
    return load_share(ids, num_experts, kind, batch, ALONE, ALONE, running)


def random_routing(tokens: int, num_experts: int, topk: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    return scores, scores.topk(topk).indices


def test_counts() -> None:
    ids = torch.tensor([[0, 2], [-1, -1], [2, -1], [1, 0]])  # sequence of token t is t % 2
    assert count_experts(ids, 4).tolist() == [[2, 1, 2, 0]]
    assert count_experts(ids, 4, groups=2).tolist() == [[1, 0, 2, 0], [1, 1, 0, 0]]
    assert count_experts(ids[:0], 4).tolist() == [[0, 0, 0, 0]]


def test_sum_over_one_rank_is_the_tensor() -> None:
    tensor = torch.ones(2)
    assert sum_over(tensor, ALONE) is tensor


def test_extremes() -> None:
    even = torch.full((8, 4), 0.25)
    balanced = torch.arange(8)[:, None] % 4
    torch.testing.assert_close(load_balancing_loss(even, share_of(balanced, 4, "aux_loss")), torch.tensor(1.0))
    collapsed = torch.zeros(8, 1, dtype=torch.int64)
    one_hot = torch.eye(4)[[0] * 8]
    torch.testing.assert_close(load_balancing_loss(one_hot, share_of(collapsed, 4, "aux_loss")), torch.tensor(4.0))


@pytest.mark.parametrize("topk", [1, 3])
def test_aux_loss(topk: int) -> None:
    scores, ids = random_routing(12, 5, topk)
    scores.requires_grad_()
    ours, plain = load_balancing_loss(scores, share_of(ids, 5, "aux_loss")), switch_loss(scores, ids)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, scores), torch.autograd.grad(plain, scores), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_equals_transformers() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(2 * 16, 8, generator=torch.Generator().manual_seed(0))
    theirs = mixtral.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    scores = logits.softmax(-1)
    ours = load_balancing_loss(scores, share_of(scores.topk(2).indices, 8, "aux_loss"))
    # Hugging Face sums the fractions of the K choices; Switch, GShard and Megatron average them.
    torch.testing.assert_close(2 * ours, theirs)


def test_seq_aux_loss_is_the_mean_over_sequences() -> None:
    batch, length = 3, 6
    scores, ids = random_routing(length * batch, 5, 2)
    ours = load_balancing_loss(scores, share_of(ids, 5, "seq_aux_loss", batch))
    of_sequences = [switch_loss(scores[b::batch], ids[b::batch]) for b in range(batch)]
    torch.testing.assert_close(ours.double(), torch.stack(of_sequences).mean(), rtol=1e-6, atol=0)
    assert len({round(float(loss), 6) for loss in of_sequences}) == batch


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_masked_tokens_count_nowhere(kind: str) -> None:
    """A batch with padding at the end of its sequences gives the loss of the sequences without padding."""
    batch, length, kept = 2, 6, 4
    scores, ids = random_routing(length * batch, 5, 2)
    mask = torch.arange(length * batch) < kept * batch
    padded = share_of(ids.masked_fill(~mask[:, None], -1), 5, kind, batch)
    plain = share_of(ids[mask], 5, kind, batch)
    ours = load_balancing_loss(scores.masked_fill(~mask[:, None], 0), padded)
    torch.testing.assert_close(ours, load_balancing_loss(scores[mask], plain))
    assert float(padded.micro_batch_tokens) == kept * batch


def test_sequences_of_other_lengths_and_empty_ones() -> None:
    """Every sequence is judged by its own tokens; one without any is left out of the mean."""
    batch, length = 3, 6
    scores, ids = random_routing(length * batch, 5, 2)
    keep = torch.ones(length, batch, dtype=torch.bool)
    keep[3:, 0] = False
    keep[:, 1] = False
    mask = keep.flatten()
    share = share_of(ids.masked_fill(~mask[:, None], -1), 5, "seq_aux_loss", batch)
    ours = load_balancing_loss(scores.masked_fill(~mask[:, None], 0), share)
    plain = (switch_loss(scores[0::3][:3], ids[0::3][:3]) + switch_loss(scores[2::3], ids[2::3])) / 2
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_nothing_but_padding(kind: str) -> None:
    scores = torch.zeros(4, 3, requires_grad=True)
    share = share_of(torch.full((4, 2), -1), 3, kind, 2)
    loss = load_balancing_loss(scores, share) + z_loss(scores, share.micro_batch_tokens, torch.zeros(4).bool())
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()


def test_global_aux_loss_runs_over_the_step() -> None:
    """The fractions are those of all micro-batches so far, the scores those of the present one."""
    running = torch.zeros(5, dtype=torch.int64)
    first_scores, first_ids = random_routing(6, 5, 2, seed=1)
    scores, ids = random_routing(6, 5, 2, seed=2)
    first = load_balancing_loss(first_scores, share_of(first_ids, 5, "global_aux_loss", running=running))
    torch.testing.assert_close(first.double(), switch_loss(first_scores, first_ids), rtol=1e-6, atol=0)
    second = load_balancing_loss(scores, share_of(ids, 5, "global_aux_loss", running=running))
    fractions = torch.cat([first_ids, ids]).flatten().bincount(minlength=5) / 24
    torch.testing.assert_close(second.double(), (5 * fractions * scores.mean(0)).sum(), rtol=1e-6, atol=0)


def test_z_loss() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, False, True])
    ours = z_loss(logits, torch.tensor(4.0), mask)
    plain = torch.stack([logits[t].exp().sum().log() ** 2 for t in (0, 1, 3, 5)]).mean()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(z_loss(logits, torch.tensor(6.0)), logits.exp().sum(-1).log().square().mean())
    assert torch.autograd.gradcheck(lambda x: z_loss(x, torch.tensor(4.0), mask), (logits,))
