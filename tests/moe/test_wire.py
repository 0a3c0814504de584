"""Wire codecs: size, accuracy, scales, unbiased stochastic rounding."""

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.moe.wire import make_codec

WIRE_DTYPES = ("fp32", "bf16", "fp8", "int8", "int4", "mxfp4", "int4x32")

#: Largest error of one number, as a share of its row's largest magnitude.
TOLERANCE = {None: 0.0, "fp32": 0.0, "bf16": 2**-8, "fp8": 2**-4, "int8": 0.51 / 127, "int4": 0.51 / 7}
TOLERANCE |= {"mxfp4": 0.201, "int4x32": 0.52 / 7}  # of the largest of 32 neighbours, hence of the row too


def round_trip(name, rows, noise=None):
    codec = make_codec(name)
    payload = codec.encode(rows, noise)
    assert payload.dim() == 2 and payload.shape[0] == rows.shape[0] and payload.is_contiguous()
    decoded = codec.decode(payload, like=rows)
    assert decoded.shape == rows.shape and decoded.dtype == rows.dtype
    return decoded, payload


@pytest.mark.parametrize("name", [None, *WIRE_DTYPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (3, 7), (1, 1), (0, 8)])
def test_error_is_bounded_by_the_rows_largest_number(name, dtype, shape):
    rows = (torch.randn(shape) * torch.logspace(-3, 3, max(shape[0], 1))[: shape[0], None]).to(dtype)
    decoded, _ = round_trip(name, rows)
    largest = rows.float().abs().amax(1, keepdim=True)
    tolerance = TOLERANCE[name] + (2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert ((decoded.float() - rows.float()).abs() <= tolerance * largest).all()


@pytest.mark.parametrize("name", WIRE_DTYPES)
def test_rows_of_zeros_stay_zero(name):
    assert (round_trip(name, torch.zeros(2, 6))[0] == 0).all()


def test_payload_sizes():
    sizes = {name: round_trip(name, torch.randn(4, 100))[1].view(torch.uint8).shape[1] for name in WIRE_DTYPES}
    assert sizes == {"fp32": 400, "bf16": 200, "fp8": 104, "int8": 104, "int4": 54, "mxfp4": 54, "int4x32": 58}


@pytest.mark.parametrize("name", ["int8", "int4", "mxfp4", "int4x32"])
def test_stochastic_rounding_is_unbiased(name):
    row = torch.tensor([[1.0, 0.3, -0.777, 0.05, -0.001]])
    noise = torch.Generator().manual_seed(0)
    mean = round_trip(name, row.repeat(20_000, 1), noise)[0].mean(0)
    step = 1.0 / {"int8": 127, "int4": 7, "int4x32": 7, "mxfp4": 3}[name]
    assert ((mean - row[0]).abs() < 0.02 * step).all()


@pytest.mark.parametrize("name", WIRE_DTYPES)
def test_a_non_finite_row_stays_visible(name):
    """Otherwise a diverging run would look healthy on the other side of the wire."""
    rows = torch.ones(5, 8)
    rows[:4, 2] = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")])
    decoded, _ = round_trip(name, rows)
    assert not decoded[:4].isfinite().all(1).any()
    assert decoded[4].isfinite().all()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["mxfp4", "int4x32"]),
    hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
        elements=st.floats(-(2.0**90), 2.0**90, width=32),
    ),
)
def test_a_large_number_coarsens_only_its_block(name, numbers):
    """Every number is off by at most a share of the largest of its own 32 neighbours."""
    rows = torch.from_numpy(numbers)
    decoded, payload = round_trip(name, rows)
    width = rows.shape[1]
    assert payload.shape[1] == (width + 1) // 2 + -(-width // 32) * {"mxfp4": 1, "int4x32": 2}[name]
    for start in range(0, width, 32):
        block, got = rows[:, start : start + 32].double(), decoded[:, start : start + 32].double()
        largest = block.abs().amax(1, keepdim=True)
        assert ((got - block).abs() <= TOLERANCE[name] * largest + 1e-37).all()


def test_fp4_is_that_of_the_microscaling_formats():
    """What its 16 codes mean, and the nearest of them; ties go to the smaller."""
    values = torch.tensor(
        [[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0.74, 0.76, 2.4, 2.6, 5.1, -4.9]]
    )
    decoded, payload = round_trip("mxfp4", values)
    expected = torch.tensor([[*values[0, :15].tolist(), 0.5, 1.0, 2.0, 3.0, 6.0, -4.0]])
    assert torch.equal(decoded, expected)
    assert payload[0, -1] == 127, "the scale is 2^0"
    assert payload[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76] and payload[0, 4] & 15 == 9, "codes of e2m1"
