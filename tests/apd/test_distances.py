"""Distances of sets of samples are those of SciPy and of their definitions."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from lightning_revflip.apd import mode_shares, modes_covered, moment_errors, sliced_wasserstein
from tests.helpers.properties import examples


def samples(n, size=3, seed=0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


# --- sliced Wasserstein distance -----------------------------------------------------------------


@examples(max_examples=40)
@given(n=st.integers(1, 30), m=st.integers(1, 30), ties=st.booleans())
def test_each_slice_is_the_distance_of_scipy(n, m, ties):
    a, b = samples(n, seed=1), samples(m, seed=2) + 0.3
    if ties:
        a, b = a.round(), b.round()
    found = sliced_wasserstein(a, b, 5, torch.Generator().manual_seed(7))
    directions = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    directions = (directions / directions.norm(dim=0)).T
    expected = [wasserstein_distance(a @ line, b @ line) for line in directions]
    assert found.item() == pytest.approx(numpy.mean(expected), rel=1e-5, abs=1e-6)


def test_a_shift_is_seen_in_every_direction():
    a = samples(50, size=2)
    shift = torch.tensor([3.0, 4.0])
    # The mean of |cos| over the plane is 2 / pi; 4000 directions know it within 1 %.
    found = sliced_wasserstein(a, a + shift, 4000, torch.Generator().manual_seed(0))
    assert found.item() == pytest.approx(5 * 2 / numpy.pi, rel=0.02)
    assert sliced_wasserstein(a, a[torch.randperm(50)]).item() == 0


# --- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 40], ids=["covariances", "inner_products"])
def test_moment_errors_are_those_of_their_definition(size):
    a, b = 2 * samples(20, size, seed=1) + 1, samples(30, size, seed=2)
    mean_error, covariance_error = moment_errors(a, b)
    ours, other = (numpy.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    shift = numpy.linalg.norm(a.double().numpy().mean(0) - b.double().numpy().mean(0))
    assert mean_error.item() == pytest.approx(shift / other.trace() ** 0.5)
    expected = numpy.linalg.norm(ours - other) / numpy.linalg.norm(other)
    assert covariance_error.item() == pytest.approx(expected)


def test_equal_samples_have_no_errors():
    a = samples(10, size=30)
    mean_error, covariance_error = moment_errors(a, a.flip(0))
    assert mean_error.item() == pytest.approx(0, abs=1e-12)
    assert covariance_error.item() == pytest.approx(0, abs=1e-7)  # the root of rounding


# --- modes ---------------------------------------------------------------------------------------

CENTRES = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])


def test_samples_belong_to_the_nearest_mode_if_that_is_near():
    points = torch.tensor([[0.1, 0.0], [0.0, 0.9], [3.5, 0.0], [2.0, 0.0], [9.0, 9.0]])
    assert mode_shares(points, CENTRES, radius=1.0).tolist() == [0.4, 0.2, 0.0]
    assert modes_covered(points, CENTRES, radius=1.0) == 2
    assert modes_covered(points, CENTRES, radius=0.05) == 0
    assert modes_covered(CENTRES, CENTRES, radius=0.0) == 3


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [sliced_wasserstein, moment_errors], ids=lambda f: f.__name__)
def test_sets_of_other_sizes_are_refused(measure):
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 2\)"):
        measure(samples(4), samples(4, 2))
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(0, 3\)"):
        measure(samples(4), samples(0))


def test_a_reference_that_does_not_vary_is_refused():
    with pytest.raises(ValueError, match="errors have no scale"):
        moment_errors(samples(4), torch.ones(5, 3))
