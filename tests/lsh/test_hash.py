"""Cross-polytope hashing: determinism, invariance to scale, and the collision behaviour that makes it an LSH."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.lsh import hash_rows, make_rotation


def plain_hash(row_D, rotation_DQW, num_hashes):
    """The definition, one row and one hash at a time."""
    codes = []
    for block_DW in rotation_DQW.chunk(num_hashes, dim=1):
        projection_W = (row_D.float() @ block_DW).tolist()
        axis = max(range(len(projection_W)), key=lambda i: abs(projection_W[i]))
        codes.append(2 * axis + (projection_W[axis] > 0))
    return codes


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_matches_the_definition(num_hashes, width, hidden, seed):
    rows = torch.randn(7, hidden, generator=torch.Generator().manual_seed(seed))
    rotation = make_rotation(hidden, num_hashes, width, seed=seed)
    codes = hash_rows(rows, rotation, num_hashes)
    assert codes.dtype == torch.int64 and codes.shape == (7, num_hashes)
    assert codes.tolist() == [plain_hash(row, rotation, num_hashes) for row in rows]


def test_rotation_is_a_pure_function_of_seed_and_stream():
    assert torch.equal(make_rotation(16, 3, 8, seed=5, stream=2), make_rotation(16, 3, 8, seed=5, stream=2))
    assert not torch.equal(make_rotation(16, 3, 8, seed=5, stream=2), make_rotation(16, 3, 8, seed=5, stream=3))
    assert not torch.equal(make_rotation(16, 3, 8, seed=5, stream=2), make_rotation(16, 3, 8, seed=6, stream=2))
    before = torch.get_rng_state()
    make_rotation(16, 3, 8, seed=5)
    assert torch.equal(before, torch.get_rng_state()), "drawing hashes must not disturb training's generator"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.5, 4.0, 1024.0])
def test_scaling_a_row_keeps_its_codes(dtype, factor):
    rows = torch.randn(200, 32, dtype=dtype)
    rotation = make_rotation(32, 4, 8, seed=1)
    # Powers of two scale exactly, so equality is exact as well.
    assert torch.equal(hash_rows(rows, rotation, 4), hash_rows(rows * factor, rotation, 4))


def test_zero_rows_share_a_code_and_opposite_rows_never_do():
    rotation = make_rotation(24, 4, 8, seed=1)
    assert (hash_rows(torch.zeros(5, 24), rotation, 4) == 0).all()
    rows = torch.randn(100, 24)
    forward, backward = hash_rows(rows, rotation, 4), hash_rows(-rows, rotation, 4)
    assert torch.equal(forward // 2, backward // 2) and (forward % 2 != backward % 2).all()


def test_closer_rows_collide_more_often():
    """Collision probabilities of one width-8 hash at several cosines, each known from simulation to +-0.03."""
    generator = torch.Generator().manual_seed(0)
    rotation = make_rotation(64, 200, 8, seed=3)
    rates = []
    for cosine in (0.5, 0.9, 0.99):
        a = torch.nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=1)
        b = torch.randn(200, 64, generator=generator)
        b = torch.nn.functional.normalize(b - (a * b).sum(1, keepdim=True) * a, dim=1)
        b = cosine * a + math.sqrt(1 - cosine**2) * b
        rates.append((hash_rows(a, rotation, 200) == hash_rows(b, rotation, 200)).float().mean().item())
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] > 0.8 and rates[0] < 0.35
