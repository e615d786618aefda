"""Which samples stay, against plain simulations."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_revflip.posterior.policies import POLICIES, make_policy
from tests.helpers.banks import held

SIZES = st.integers(1, 20)


def thinned(max_samples, offered):
    """Every stride-th sample, by dropping every other one of a list when it is full."""
    kept, stride = [], 1
    for serial in range(offered):
        if (serial + 1) % stride == 0:
            kept.append(serial)
        if len(kept) > max_samples:
            stride *= 2
            kept = [s for s in kept if (s + 1) % stride == 0]
    return kept


@given(SIZES, st.integers(0, 300))
def test_latest_holds_the_last_samples(max_samples, offered):
    assert held("latest", max_samples, offered) == list(range(offered))[-max_samples:]


@given(SIZES, st.integers(0, 300))
def test_spread_doubles_its_stride_when_it_is_full(max_samples, offered):
    assert held("spread", max_samples, offered) == thinned(max_samples, offered)


@given(SIZES, st.integers(0, 300))
def test_spread_holds_at_least_half_at_equal_distances(max_samples, offered):
    kept = held("spread", max_samples, offered)
    assert min(offered, (max_samples + 1) // 2) <= len(kept) <= max_samples
    assert len({b - a for a, b in pairwise(kept)}) <= 1


@given(SIZES, st.integers(0, 100))
def test_reservoir_holds_as_many_as_it_may(max_samples, offered):
    assert len(held("reservoir", max_samples, offered)) == min(max_samples, offered)


def test_reservoir_holds_every_sample_with_the_same_probability():
    counts = [0] * 20
    for seed in range(2000):
        for serial in held("reservoir", 5, 20, seed):
            counts[serial] += 1
    # Each count has mean 500 and variance 375; together they always make 10,000, hence 19 / 20.
    statistic = sum((count - 500) ** 2 for count in counts) / 375 * 19 / 20
    assert stats.chi2.sf(statistic, 19) > 0.001


@pytest.mark.parametrize("name", POLICIES)
@given(SIZES, st.integers(0, 100), st.integers(0, 100))
def test_a_policy_continues_where_another_process_stopped(name, max_samples, offered, more):
    whole = make_policy(name, max_samples, seed=3)
    for serial in range(offered):
        whole.accept(serial)
    continued = make_policy(name, max_samples, seed=3, offered=offered)
    for serial in range(offered, offered + more):
        assert continued.decide(serial) == whole.decide(serial)
        whole.accept(serial)
        continued.accept(serial)


@pytest.mark.parametrize("name", POLICIES)
def test_without_a_limit_every_sample_stays(name):
    assert held(name, None, 50) == list(range(50))


def test_unknown_policies_and_empty_banks_are_refused():
    with pytest.raises(ValueError, match="one of spread, reservoir, latest, got 'newest'"):
        make_policy("newest", 5, 0)
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        make_policy("latest", 0, 0)
