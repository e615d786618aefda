"""Losses and penalties are those of the papers, in value and in gradient."""

import pytest
import torch
from torch import nn

from lightning_revflip.apd import Critic, critic_loss, generator_loss, gradient_penalty, r1_penalty


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(n, seed, size=3):
    return torch.randn(n, size, generator=generator(seed), dtype=torch.float64)


SLOPE = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)


def linear(points):
    """A critic of slope 5."""
    return points @ SLOPE + 7


def smooth():
    """A critic whose second derivatives are not 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()


def test_losses_of_a_linear_critic_are_differences_of_means():
    real, fake = codes(6, 1), codes(4, 2)
    shift = (fake.mean(0) - real.mean(0)) @ SLOPE
    torch.testing.assert_close(critic_loss(linear, real, fake), shift)
    torch.testing.assert_close(generator_loss(linear, fake), -(fake.mean(0) @ SLOPE + 7))


def test_penalties_of_a_linear_critic_have_a_closed_form():
    real, fake = codes(6, 1), codes(6, 2)
    assert gradient_penalty(linear, real, fake).item() == pytest.approx((5 - 1) ** 2)
    assert r1_penalty(linear, real).item() == pytest.approx(5**2 / 2)


def test_the_gradient_penalty_is_taken_at_uniform_points_between_pairs():
    seen = []

    def critic(points):
        seen.append(points.detach())
        return linear(points)

    n = 2000
    real, fake = codes(n, 1), codes(n, 2)
    gradient_penalty(critic, real, fake, generator(3))
    (points,) = seen
    shares = (points - fake) / (real - fake)
    assert shares.std(1).max() < 1e-6  # one share for a pair
    ordered = shares[:, 0].sort().values
    uniform = torch.arange(1, n + 1) / n
    # Kolmogorov-Smirnov at 1 in 1000: 1.95 / sqrt(n).
    assert (ordered - uniform).abs().max() < 1.95 / n**0.5
    gradient_penalty(critic, real, fake, generator(3))
    assert seen[1].equal(points)


@pytest.mark.parametrize("penalty", ["gradient", "r1"])
def test_penalties_are_those_of_numerical_slopes(penalty):
    critic, real = smooth(), codes(5, 1)
    step = 1e-5
    shifts = step * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack(
            [(critic(real + shift) - critic(real - shift)) / (2 * step) for shift in shifts], 1
        )
    if penalty == "gradient":
        expected = (slopes.norm(dim=1) - 1).square().mean()
        found = gradient_penalty(critic, real, real)  # between equal codes there is one point
    else:
        expected = slopes.square().sum(1).mean() / 2
        found = r1_penalty(critic, real)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("penalty", ["gradient", "r1"])
def test_gradients_of_penalties_are_those_of_finite_differences(penalty):
    critic, real, fake = smooth(), codes(5, 1), codes(5, 2)

    def value():
        if penalty == "r1":
            return r1_penalty(critic, real)
        return gradient_penalty(critic, real, fake, generator(3))

    weight = critic[0].weight
    (gradient,) = torch.autograd.grad(value(), weight)
    step = 1e-5
    for place in [(0, 0), (3, 1), (7, 2)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(value().item())
            with torch.no_grad():
                weight[place] -= sign * step
        numerical = (values[0] - values[1]) / (2 * step)
        assert gradient[place].item() == pytest.approx(numerical, rel=1e-6)


def test_the_critic_learns_nothing_of_the_generator_through_the_penalty():
    real, fake = codes(5, 1), codes(5, 2).requires_grad_()
    penalty = gradient_penalty(smooth(), real, fake)
    (gradient,) = torch.autograd.grad(penalty, fake, allow_unused=True)
    assert gradient is None


def test_a_flat_critic_has_a_finite_gradient():
    critic = Critic(3, hidden=[4])
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
    penalty = gradient_penalty(critic, torch.ones(2, 3), torch.zeros(2, 3))
    penalty.backward()
    assert penalty.item() == 1
    assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)


def test_penalties_work_without_gradients_around_them():
    with torch.no_grad():
        assert gradient_penalty(linear, codes(2, 1), codes(2, 2)).item() == pytest.approx(16)


def test_pairs_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match=r"same shape, got \(3, 3\) and \(2, 3\)"):
        gradient_penalty(linear, codes(3, 1), codes(2, 2))
