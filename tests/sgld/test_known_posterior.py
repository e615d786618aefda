"""Every sampler on linear regression: the posterior is known, and the law of each step size.

A few thousand chains stand beside each other as the rows of one parameter. Their covariance is held
against the exact stationary covariance of their step size (`stationary_covariance`), and against
the posterior itself where the step size changes that by little.
"""

import copy
import math
from functools import cache

import pytest
import torch

from lightning_revflip.sgld import PSGLD, SGHMC, SGLD
from tests.helpers.known_posteriors import (
    LinearRegression,
    agreement,
    run_chains,
    stationary_covariance,
)

# One configuration for all data. With G = 4 to 10, all forget their start in 100 to 170 steps.
SAMPLERS = {
    "sgld": (SGLD, {"lr": 0.02}),
    "psgld": (PSGLD, {"lr": 0.003, "stabilizer": 0.1, "adaptation_steps": 300}),
    "sghmc": (SGHMC, {"lr": 1e-3, "friction": 0.1}),
}
PRIOR_PRECISION = 10.0
CHAINS = 3000


def chains(sampler, problem, dtype=torch.float32, **changes):
    """Samples (samples, chains, d), which start two posterior standard deviations away."""
    make, settings = SAMPLERS[sampler]
    settings = {"num_data": problem.num_data, "prior_precision": problem.prior_precision} | settings
    start = problem.mean + 2 * problem.covariance().diagonal().sqrt()
    theta = torch.nn.Parameter(start.expand(CHAINS, -1).to(dtype, copy=True))
    generator = torch.Generator().manual_seed(1)
    optimizer = make([theta], **settings | changes, generator=generator)
    batches = torch.Generator().manual_seed(2)
    samples = run_chains(
        optimizer,
        theta,
        lambda theta: problem.gradient(theta.double(), batches).to(dtype),
        burn_in=1000,
        samples=20,
        every=50,
    )
    return samples, optimizer, theta


def preconditioner(optimizer, theta):
    """The mean over the chains of G, from the move that a gradient of 1 makes without noise."""
    optimizer, theta = copy.deepcopy((optimizer, theta))
    with torch.no_grad():
        theta.zero_()
    optimizer.param_groups[0]["temperature"] = 0.0
    theta.grad = torch.ones_like(theta)
    optimizer.step()
    return theta.detach().double().mean(0) / (-optimizer.param_groups[0]["lr"] / 2)


@cache
def run(sampler, num_data, batch_size, temperature=1.0, prior_precision=PRIOR_PRECISION):
    """A problem, samples of its posterior and the covariance that they should have."""
    problem = LinearRegression.generate(num_data, prior_precision, batch_size=batch_size)
    samples, optimizer, theta = chains(sampler, problem, temperature=temperature)
    known = {"lr": optimizer.param_groups[0]["lr"], "temperature": temperature}
    if sampler == "psgld":
        known["preconditioner"] = preconditioner(optimizer, theta)
    return problem, samples, stationary_covariance(problem, sampler, **known)


def relative(covariance, truth):
    return float((covariance - truth).norm() / truth.norm())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch_size", [None, 50], ids=["all_data", "minibatch"])
@pytest.mark.parametrize("num_data", [100, 10_000])
def test_chains_have_the_law_of_their_step_size(sampler, num_data, batch_size):
    # Minibatches of 50 of the 10,000 make the covariance 2 to 3 times that of the posterior.
    problem, samples, covariance = run(sampler, num_data, batch_size)
    assert agreement(samples, problem.mean, covariance).within(0.05, 0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("num_data", "batch_size"),
    [(100, None), (10_000, None), (10_000, 5000)],
    ids=["100_all_data", "10000_all_data", "10000_minibatch"],
)
def test_small_steps_sample_the_posterior(sampler, num_data, batch_size):
    problem, samples, covariance = run(sampler, num_data, batch_size)
    posterior = problem.covariance()
    assert relative(covariance, posterior) < 0.03  # the bias that the step size brings
    assert agreement(samples, problem.mean, posterior).within(0.05, 0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_covariance_is_proportional_to_the_temperature(sampler, temperature):
    problem, samples, _ = run(sampler, 100, None, temperature)
    posterior = temperature * problem.covariance()
    assert agreement(samples, problem.mean, posterior).within(0.05, 0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variance_falls_as_one_over_the_number_of_data(sampler):
    # The trap: noise whose scale is a setting of its own samples a temperature that grows with N.
    few, many = (run(sampler, num_data, None, prior_precision=0.0) for num_data in (100, 10_000))
    ratio = [(samples - problem.mean).square().mean() for problem, samples, _ in (few, many)]
    assert float(ratio[0] / ratio[1]) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_prior_alone_is_sampled_where_there_is_no_loss(sampler):
    # The prior counts N times less than the loss, so N = 10 of precision 10 has the curvature 1.
    theta = torch.nn.Parameter(torch.full((CHAINS, 3), 0.6))
    make, settings = SAMPLERS[sampler]
    generator = torch.Generator().manual_seed(1)
    optimizer = make([theta], num_data=10, prior_precision=10.0, generator=generator, **settings)
    samples = run_chains(optimizer, theta, torch.zeros_like, burn_in=1000, samples=20, every=50)
    law = torch.zeros(3).double(), torch.eye(3).double() / 10
    assert agreement(samples, *law).within(0.05, 0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float64_has_the_same_law(sampler):
    problem, _, covariance = run(sampler, 100, None)
    samples, _, _ = chains(sampler, problem, torch.float64)
    assert samples.dtype == torch.float64
    assert agreement(samples, problem.mean, covariance).within(0.05, 0.05)


# --- a preconditioner that never stops to adapt ---------------------------------------------------


def variance_without_correction(curvature, num_data, stabilizer):
    """Of the law to which small steps with G(theta) converge without the term for its derivative.

    d theta = -G U'/2 dt + sqrt(G) dW has the density exp(-U) / G, up to a factor. Here 1/G =
    stabilizer + |curvature theta|, and U is that of a normal law; moments of |u| are known.
    """
    precision = num_data * curvature
    slope = curvature / precision**0.5
    first, third = (2 / math.pi) ** 0.5, 2 * (2 / math.pi) ** 0.5  # E|u|, E|u|^3
    return (stabilizer + slope * third) / (stabilizer + slope * first) / precision


@pytest.mark.parametrize("stabilizer", [0.03, 0.3])
def test_psgld_that_adapts_for_ever_is_off_by_what_the_missing_term_predicts(stabilizer):
    problem = LinearRegression.generate(100, spectrum=(1.0,))
    settings = {"smoothing": 0.0, "stabilizer": stabilizer, "lr": 0.003}
    samples, _, _ = chains("psgld", problem, adaptation_steps=None, **settings)
    found = float((samples - problem.mean).square().mean())
    expected = variance_without_correction(1.0, 100, stabilizer)
    assert expected > 1.1 * float(problem.covariance())
    assert found == pytest.approx(expected, rel=0.05)
