"""The statistics that tests rely on, against values known by hand and by scipy."""

import pytest
import torch

from tests.helpers.statistics import (
    largest_correlation,
    largest_distance,
    normal_distance,
    two_sample_distance,
)


def samples(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()


def test_distances_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = samples(500, 0), samples(300, 1) + 0.1
    assert two_sample_distance(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic, abs=1e-6)
    assert normal_distance(b) == pytest.approx(stats.kstest(b.numpy(), "norm").statistic, abs=1e-6)


def test_equal_values_of_a_discrete_law_have_no_distance():
    ones = torch.ones(50)
    assert two_sample_distance(ones, ones[:20]) == 0
    assert two_sample_distance(ones, -ones) == 1


def test_the_limit_is_met_by_one_law_and_missed_by_another():
    limit = largest_distance(2000, 2000)
    assert two_sample_distance(samples(2000, 0), samples(2000, 1)) < limit
    assert two_sample_distance(samples(2000, 0), 1.3 * samples(2000, 1) + 0.1) > limit


def test_correlation_in_standard_errors():
    a, b = samples(1000, 0), samples(1000, 1)
    assert largest_correlation(torch.stack([a, b], dim=1)) < 5
    assert largest_correlation(torch.stack([a, b, -a], dim=1)) == pytest.approx(1000**0.5)
