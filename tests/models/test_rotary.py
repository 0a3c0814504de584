"""Rotary position embedding."""

from __future__ import annotations

import pytest
import torch

from megatron_lsh.models.rotary import rotary_embedding


def test_scores_depend_on_the_distance_only() -> None:
    """Vectors q and k placed at (m, n) and (m + 9, n + 9) have the same product, and at other distances another."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rotary = rotary_embedding(torch.arange(40), 16)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotary(x.expand(40, 1, 1, 16))[position].flatten()

    score = at(q, 7) @ at(k, 3)
    torch.testing.assert_close(at(q, 16) @ at(k, 12), score, rtol=1e-5, atol=1e-5)
    assert abs(at(q, 17) @ at(k, 12) - score) > 1e-3
    torch.testing.assert_close(at(q, 5).norm(), q.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(at(q, 0), q)


def test_complex_rotation() -> None:
    """Channels i and i + R/2 are the real and imaginary part of a number turned by position * base^(-2i/R)."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 8)
    turned = rotary_embedding(torch.arange(5), 8, base=100.0)(x)
    angle = torch.arange(5.0)[:, None] * 100.0 ** (-torch.arange(4.0) / 4)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)[:, None, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))


def test_partial_rotation_leaves_the_other_channels() -> None:
    x = torch.randn(5, 2, 3, 8)
    turned = rotary_embedding(torch.arange(5), 8, percent=0.5)(x)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], rotary_embedding(torch.arange(5), 4)(x[..., :4]))


def test_positions_per_sequence() -> None:
    x = torch.randn(4, 2, 1, 8)
    both = rotary_embedding(torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]), 8)(x)
    second = rotary_embedding(torch.tensor([0, 1, 0, 1]), 8)(x[:, 1:])
    torch.testing.assert_close(both[:, 1:], second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert rotary_embedding(torch.arange(4), 8)(torch.randn(4, 1, 1, 8, dtype=dtype)).dtype == dtype


def test_interleaved_rotation_turns_neighbours_as_complex_numbers() -> None:
    x = torch.randn(5, 2, 3, 8)
    turned = rotary_embedding(torch.arange(5), 8, percent=0.5, base=100.0, interleaved=True)(x)
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 100.0**-0.5])
    pairs = (
        torch.view_as_complex(x[..., :4].reshape(5, 2, 3, 2, 2)) * torch.polar(torch.ones(5, 2), angles)[:, None, None]
    )
    torch.testing.assert_close(turned[..., :4], torch.view_as_real(pairs).flatten(-2))
    assert torch.equal(turned[..., 4:], x[..., 4:])
