"""Fixed-point numbers: exact integers, correctly rounded, within their range."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.reversible.fixed_point import FixedPoint
from tests.helpers.properties import examples

FORMATS = (FixedPoint(20), FixedPoint(23))
formats = st.sampled_from(FORMATS)
int32 = st.integers(-(2**31) + 1, 2**31 - 1)


@given(formats, st.lists(int32, min_size=1, max_size=50))
@examples()
def test_every_number_survives_the_way_through_float64(fixed_point, integers):
    fixed = torch.tensor(integers, dtype=torch.float64)
    back = fixed_point.from_float(fixed_point.to_float(fixed, torch.float64))
    assert back.dtype == torch.float64
    assert back.tolist() == integers


@given(formats, st.lists(st.floats(-255, 255, width=32), min_size=1, max_size=50))
@examples()
def test_floats_are_rounded_to_the_nearest_number_ties_to_even(fixed_point, values):
    truth = [round(Fraction(value) * 2**fixed_point.fraction_bits) for value in values]
    assert fixed_point.from_float(torch.tensor(values)).tolist() == truth


def test_ties_are_rounded_to_even():
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5], dtype=torch.float64) * 2**-23
    assert FixedPoint(23).from_float(ties).tolist() == [0, 2, 2, 0, -2]


@given(formats, st.lists(int32, min_size=1, max_size=50))
@examples()
def test_float32_value_is_the_nearest_float32(fixed_point, integers):
    found = fixed_point.to_float(torch.tensor(integers, dtype=torch.float64), torch.float32)
    truth = [float(np.float32(value / 2**fixed_point.fraction_bits)) for value in integers]
    assert found.dtype == torch.float32
    assert found.tolist() == truth


@given(formats, int32, st.floats(-1, 1, width=32))
@examples()
def test_subtracting_an_update_restores_what_adding_it_changed(fixed_point, integer, update):
    state = torch.tensor([float(integer)], dtype=torch.float64)
    step = fixed_point.from_float(torch.tensor([update]))
    assert ((state + step) - step).item() == integer


@pytest.mark.parametrize("fixed_point", FORMATS)
def test_limit_is_the_range_of_int32(fixed_point):
    largest = torch.tensor([2.0**31 - 1], dtype=torch.float64)
    below = fixed_point.to_float(largest, torch.float64).item()
    assert below < fixed_point.limit == below + 2.0**-fixed_point.fraction_bits


@pytest.mark.parametrize("fixed_point", FORMATS)
def test_check_accepts_what_is_representable(fixed_point):
    limit = fixed_point.limit
    fixed_point.check(torch.tensor([-limit + 0.1, limit - 0.1]), "x")
    fixed_point.check(torch.tensor([limit - 5.1]), "x", growth=5)
    fixed_point.check(torch.empty(0, 3), "x", growth=1e9)


@pytest.mark.parametrize("value", [256.0, -256.0, 1e30, float("inf"), float("-inf"), float("nan")])
def test_check_names_the_tensor_and_the_range(value):
    message = r"h_0 must be finite and stay below 256 in magnitude .*23 fractional bits.*, got a"
    with pytest.raises(ValueError, match=message):
        FixedPoint(23).check(torch.tensor([[0.5, value]]), "h_0")


def test_check_counts_what_the_pass_may_add():
    with pytest.raises(ValueError, match=r"largest magnitude of 250, and this pass can add .* 6"):
        FixedPoint(23).check(torch.tensor([250.0]), "h_0", growth=6)
