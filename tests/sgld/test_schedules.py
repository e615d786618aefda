"""Step sizes and temperatures over time, against their formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_revflip.sgld import SGLD, CyclicalSchedule, PolynomialSchedule
from tests.helpers.samplers import through_file


def sampler(**changes):
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5, "temperature": 2.0}]
    settings = {"lr": 0.1, "num_data": 10, "generator": torch.Generator().manual_seed(0)}
    return SGLD(groups, **settings | changes)


def advance(optimizer, schedule):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    schedule.step()


def settings_of(optimizer):
    return [(group["lr"], group["temperature"]) for group in optimizer.param_groups]


def positions(optimizer):
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


# --- polynomial -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "gamma"), [(0.1, 1.0, 0.55), (2.0, 30.0, 1.0)])
def test_polynomial_step_sizes_are_those_of_the_formula_in_every_group(a, b, gamma):
    optimizer = sampler()
    schedule = PolynomialSchedule(optimizer, a, b, gamma)
    for t in range(50):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(a * (b + t) ** -gamma, rel=1e-12)
        advance(optimizer, schedule)
    assert [group["temperature"] for group in optimizer.param_groups] == [1.0, 2.0]


@pytest.mark.parametrize("setting", ["a", "b"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_polynomial_scales_are_positive_numbers(setting, value):
    arguments = {"a": 0.1, "b": 1.0, setting: value}
    with pytest.raises(ValueError, match=f"{setting} must be a positive number, got {value}"):
        PolynomialSchedule(sampler(), **arguments, gamma=0.55)


@pytest.mark.parametrize("gamma", [0.0, -1.0, 1.1, math.nan])
def test_polynomial_step_sizes_fall_at_most_as_one_over_t(gamma):
    with pytest.raises(ValueError, match=rf"gamma must lie in \(0, 1\], got {gamma}"):
        PolynomialSchedule(sampler(), 0.1, 1.0, gamma)


# --- cyclical -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cycle", "exploration"), [(10, 0.8), (7, 0.5), (4, 0.0), (1, 0.0)])
def test_cyclical_step_sizes_and_temperatures_are_those_of_the_formula(cycle, exploration):
    optimizer = sampler()
    schedule = CyclicalSchedule(optimizer, cycle, exploration)
    for t in range(3 * cycle + 2):
        r = (t % cycle) / cycle
        assert schedule.sampling == (r >= exploration)
        share = (math.cos(math.pi * r) + 1) / 2
        heat = 1.0 if r >= exploration else 0.0
        expected = [(0.1 * share, heat), (0.5 * share, 2.0 * heat)]
        assert settings_of(optimizer) == [pytest.approx(each) for each in expected]
        advance(optimizer, schedule)


@pytest.mark.parametrize(
    ("cycle", "exploration", "first"), [(10, 0.8, 8), (50, 0.58, 29), (10, 0.3, 3), (100, 0.07, 7)]
)
def test_a_share_that_is_a_whole_number_of_steps_is_kept_exactly(cycle, exploration, first):
    # 0.58 * 50 is not 29 in floating point, but 29 / 50 is 0.58.
    optimizer = sampler()
    schedule = CyclicalSchedule(optimizer, cycle, exploration)
    sampling = []
    for _ in range(cycle):
        sampling.append(schedule.sampling)
        advance(optimizer, schedule)
    assert sampling == [t >= first for t in range(cycle)]


def test_exploration_has_no_noise_and_sampling_has():
    optimizer = sampler()
    schedule = CyclicalSchedule(optimizer, 10, 0.6)
    for _ in range(25):
        noise, sampling = optimizer.generator.get_state(), schedule.sampling
        advance(optimizer, schedule)
        assert torch.equal(optimizer.generator.get_state(), noise) != sampling


def test_step_sizes_alone_change_where_there_is_no_temperature():
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = CyclicalSchedule(plain, 10)
    advance(plain, schedule)
    assert plain.param_groups[0]["lr"] == pytest.approx(0.05 * (math.cos(math.pi / 10) + 1))
    assert "temperature" not in plain.param_groups[0]


@pytest.mark.parametrize("cycle", [0, -1])
def test_a_cycle_has_steps(cycle):
    with pytest.raises(ValueError, match=f"cycle_steps must be at least 1, got {cycle}"):
        CyclicalSchedule(sampler(), cycle)


@pytest.mark.parametrize("exploration", [-0.1, 1.0, 1.5, math.nan])
def test_exploration_leaves_steps_that_sample(exploration):
    with pytest.raises(ValueError, match=rf"exploration must lie in \[0, 1\), got {exploration}"):
        CyclicalSchedule(sampler(), 10, exploration)


@pytest.mark.parametrize(("cycle", "exploration"), [(3, 0.8), (1, 0.5)])
def test_a_cycle_too_short_for_its_share_is_refused(cycle, exploration):
    with pytest.raises(ValueError, match="exploration"):
        CyclicalSchedule(sampler(), cycle, exploration)


# --- both -----------------------------------------------------------------------------------------

SCHEDULES = {
    "polynomial": lambda optimizer: PolynomialSchedule(optimizer, 0.1, 1.0, 0.55),
    "cyclical": lambda optimizer: CyclicalSchedule(optimizer, 10, 0.6),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [0, 3, 7, 13])
def test_a_saved_state_resumes_bit_for_bit(name, steps):
    optimizer = sampler()
    schedule = SCHEDULES[name](optimizer)
    for _ in range(steps):
        advance(optimizer, schedule)
    states = through_file([optimizer.state_dict(), schedule.state_dict()])
    other = sampler()
    for group, old in zip(other.param_groups, optimizer.param_groups, strict=True):
        for param, value in zip(group["params"], old["params"], strict=True):
            param.data.copy_(value.data)
    again = SCHEDULES[name](other)
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    for _ in range(15):
        assert settings_of(other) == settings_of(optimizer)
        advance(optimizer, schedule)
        advance(other, again)
        for one, two in zip(positions(other), positions(optimizer), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_copy_of_optimizer_and_schedule_goes_on_on_its_own(name):
    optimizer = sampler()
    schedule = SCHEDULES[name](optimizer)
    for _ in range(7):
        advance(optimizer, schedule)
    other, again = copy.deepcopy((optimizer, schedule))
    for _ in range(10):
        advance(other, again)
    for _ in range(10):
        advance(optimizer, schedule)
    assert settings_of(other) == settings_of(optimizer)
    for one, two in zip(positions(other), positions(optimizer), strict=True):
        assert torch.equal(one, two)


# --- two far modes --------------------------------------------------------------------------------


def share_of_the_other_mode(lr, make_schedule=None):
    """Among the samples of 200 chains that start in one of two modes, at 1 and -1."""
    theta = nn.Parameter(torch.ones(200))
    # U = N (theta^2 - 1)^2 / 4 with N = 100: between the modes, the density is exp(-25) lower.
    optimizer = SGLD([theta], lr, num_data=100, generator=torch.Generator().manual_seed(0))
    schedule = make_schedule(optimizer) if make_schedule else None
    kept = []
    for _ in range(1000):
        theta.grad = theta.detach() * (theta.detach().square() - 1)
        optimizer.step()
        if schedule is None or schedule.sampling:
            kept.append(theta.detach().clone())
        if schedule is not None:
            schedule.step()
    return float((torch.stack(kept) < 0).double().mean())


def test_cycles_visit_both_modes_and_constant_steps_stay_in_one():
    assert share_of_the_other_mode(0.1) == 0
    # Steps that are long enough to leave a mode: the curvature of U / N is 2, so from lr = 2.
    cyclical = share_of_the_other_mode(3.6, lambda optimizer: CyclicalSchedule(optimizer, 50, 0.8))
    assert 0.3 < cyclical < 0.7
