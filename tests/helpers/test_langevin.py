"""The references of the sampler tests, against autograd, closed forms and each other."""

import pytest
import torch

from tests.helpers.known_posteriors import (
    LinearRegression,
    LogisticRegression,
    agreement,
    moments_on_grid,
    stationary_covariance,
)
from tests.helpers.langevin import ReferencePSGLD, ReferenceSGHMC, ReferenceSGLD

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- posteriors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 20])
def test_linear_regression_is_the_posterior_of_its_density(batch_size):
    problem = LinearRegression.generate(100, 10.0, batch_size=batch_size)

    def potential(theta):
        return (problem.y - problem.x @ theta).square().sum() / 2 + 5 * theta.square().sum()

    mean = problem.mean.requires_grad_()
    slope = torch.autograd.grad(potential(mean), mean)[0]
    torch.testing.assert_close(slope, torch.zeros(3).double(), atol=1e-10, rtol=0)
    hessian = torch.autograd.functional.hessian(potential, mean.detach())
    torch.testing.assert_close(problem.covariance(2.0), 2 * torch.linalg.inv(hessian), **CLOSE)


def test_linear_regression_has_one_curvature_for_all_numbers_of_data():
    few, many = (LinearRegression.generate(n, batch_size=20).curvature for n in (100, 10_000))
    torch.testing.assert_close(few, many, **CLOSE)
    spectrum = torch.tensor([1.0, 1.5, 2.0]).double()
    torch.testing.assert_close(torch.linalg.eigvalsh(few), spectrum, **CLOSE)


def test_gradient_is_that_of_one_random_batch_for_each_row():
    problem = LinearRegression.generate(100, batch_size=20)
    theta = normal(500, 3)
    found = problem.gradient(theta, torch.Generator().manual_seed(0))
    drawn = torch.randint(200, (500,), generator=torch.Generator().manual_seed(0))
    for row in (0, 1, 499):
        weights = theta[row].clone().requires_grad_()
        batch = problem.batches[drawn[row]]
        loss = (problem.y[batch] - problem.x[batch] @ weights).square().mean() / 2
        torch.testing.assert_close(found[row], torch.autograd.grad(loss, weights)[0], **CLOSE)


def test_gradient_noise_is_the_covariance_over_all_batches():
    problem = LinearRegression.generate(100, batch_size=20)
    S = torch.diag(torch.tensor([0.3, 0.1, 0.2])).double()
    theta = problem.mean + normal(400_000, 3) @ S.sqrt()
    generator = torch.Generator().manual_seed(1)
    full = theta @ problem.hessians.mean(0) - problem.slopes.mean(0)
    errors = problem.gradient(theta, generator) - full
    expected = problem.gradient_noise(S)
    # Standard error of a covariance: about sqrt(4 / 400,000) = 0.3 % of its norm.
    assert float((errors.T @ errors / len(errors) - expected).norm() / expected.norm()) < 0.02


def test_logistic_regression_gradient_is_that_of_its_potential():
    problem = LogisticRegression.generate(60, 2.0)
    theta = normal(4, 2).requires_grad_()
    expected = torch.autograd.grad(problem.potential(theta).sum(), theta)[0] / 60
    found = problem.gradient(theta.detach()) + 2.0 / 60 * theta.detach()
    torch.testing.assert_close(found, expected, **CLOSE)
    order = torch.stack([torch.randperm(60) for _ in range(4)])
    torch.testing.assert_close(
        problem.gradient(theta.detach(), order), problem.gradient(theta.detach()), **CLOSE
    )


def test_quadrature_finds_the_moments_of_a_normal_law():
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64)

    def potential(theta):
        return ((theta - mean) @ torch.linalg.inv(covariance) * (theta - mean)).sum(1) / 2

    found = moments_on_grid(potential, -7, 7, 300)
    torch.testing.assert_close(found, (mean, covariance), rtol=1e-9, atol=1e-9)


# --- laws of chains -------------------------------------------------------------------------------


def test_step_size_bias_of_sgld_is_one_over_one_minus_a_quarter_of_the_curvature():
    problem = LinearRegression.generate(100, 10.0)
    values, vectors = torch.linalg.eigh(problem.curvature)
    expected = vectors @ (2 / (100 * values * (1 - 0.3 * values / 4))).diag() @ vectors.T
    found = stationary_covariance(problem, "sgld", 0.3, temperature=2.0)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("friction", [0.05, 0.5, 1.0])
def test_sghmc_has_no_step_size_bias_on_all_the_data(friction):
    problem = LinearRegression.generate(100, 10.0)
    found = stationary_covariance(problem, "sghmc", 0.5, temperature=0.5, friction=friction)
    torch.testing.assert_close(found, problem.covariance(0.5), **CLOSE)


@pytest.mark.parametrize("sampler", ["sgld", "psgld", "sghmc"])
@pytest.mark.parametrize("batch_size", [None, 20])
def test_reference_chains_converge_to_the_stationary_covariance(sampler, batch_size):
    problem = LinearRegression.generate(100, 10.0, batch_size=batch_size)
    settings = {"num_data": 100, "temperature": 2.0, "prior_precision": 10.0}
    theta = problem.mean.expand(4000, 3)
    lr, preconditioner = 0.3, None
    if sampler == "sgld":
        chain = ReferenceSGLD(theta, lr, **settings)
    elif sampler == "sghmc":
        chain = ReferenceSGHMC(theta, lr, friction=0.4, **settings)
    else:
        # The mean square stays that of the first gradient, here the same in all chains.
        chain = ReferencePSGLD(theta, lr, stabilizer=0.5, adaptation_steps=1, **settings)
        square = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
        chain.squares.append(square.expand(4000, 3))
        preconditioner = 1 / (0.5 + square.sqrt())
    expected = stationary_covariance(
        problem, sampler, lr, temperature=2.0, friction=0.4, preconditioner=preconditioner
    )
    generator = torch.Generator().manual_seed(0)
    kept = []
    for step in range(200):
        noise = torch.randn(4000, 3, dtype=torch.float64, generator=generator)
        chain.step(problem.gradient(chain.theta, generator), noise)
        if step >= 100 and step % 10 == 9:
            kept.append(chain.theta)
    # Minibatches add a fifth or more to the variance, so a law without them would not pass.
    assert agreement(torch.stack(kept), problem.mean, expected).within(0.05, 0.05)


@pytest.mark.parametrize("make", [ReferenceSGLD, ReferencePSGLD, ReferenceSGHMC])
def test_noise_of_a_move_is_the_noise_that_was_handed_in(make):
    chain, watcher = (make(torch.zeros(5), 0.1, num_data=10, temperature=0.7) for _ in range(2))
    for step in range(20):
        before, noise = chain.theta, normal(5, seed=step)
        chain.step(torch.zeros(5), noise)
        torch.testing.assert_close(
            watcher.noise_of(chain.theta - before), noise, rtol=1e-6, atol=1e-6
        )


# --- the comparison of samples with a law ---------------------------------------------------------


def test_agreement_takes_the_right_law_and_no_other():
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64)
    samples = mean + normal(4, 4000, 2) @ torch.linalg.cholesky(covariance).T
    assert agreement(samples, mean, covariance).within(0.05, 0.05)
    assert not agreement(samples, mean + 0.07, covariance).within(0.05, 0.05)
    assert not agreement(samples, mean, 1.1 * covariance).within(0.05, 0.05)
    # Standard errors: 1 / sqrt(16,000) of a mean, about sqrt(2.9 / 16,000) of this covariance.
    found = agreement(samples, mean, covariance)
    assert found.mean_error == pytest.approx(16_000**-0.5, rel=0.05)
    assert 0.01 < found.covariance_error < 0.015


def test_agreement_refuses_too_few_samples():
    law = torch.zeros(2).double(), torch.eye(2).double()
    with pytest.raises(AssertionError, match="too few samples"):
        agreement(normal(1, 100, 2), *law).within(0.05, 0.05)
