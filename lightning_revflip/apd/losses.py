"""Losses of Wasserstein GANs, and penalties that keep their critics smooth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CriticFunction = Callable[[Tensor], Tensor]
"""Values, shape (n,), of codes, shape (n, size)."""


def critic_loss(critic: CriticFunction, real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimizes.

    E D(fake) - E D(real)                                               (Arjovsky et al., 2017)

    For a critic of Lipschitz constant 1 its negative is a lower bound of the Wasserstein distance.

    Args:
        critic: the function D.
        real: codes of samples, shape (n, size).
        fake: generated codes, shape (m, size).

    Returns:
        A scalar.
    """
    return _mean(critic(fake)) - _mean(critic(real))


def generator_loss(critic: CriticFunction, fake: Tensor) -> Tensor:
    """What the generator minimizes: -E D(fake).

    Args:
        critic: the function D.
        fake: generated codes, shape (n, size), with their graph.

    Returns:
        A scalar.
    """
    return -_mean(critic(fake))


def gradient_penalty(
    critic: CriticFunction,
    real: Tensor,
    fake: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How far the critic is from a slope of 1 between real and generated codes.

    E (|grad D(x)| - 1)^2,  x = u real + (1 - u) fake,  u ~ U(0, 1)     (Gulrajani et al., 2017)

    Args:
        critic: the function D; computes each code apart from the others of its batch.
        real: codes of samples, shape (n, size).
        fake: generated codes, of the same shape.
        generator: draws u, one number for each pair; None: torch's global one.

    Returns:
        A scalar, to be weighted with lambda; it has a graph, of second derivatives.

    Raises:
        ValueError: for different shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(
            "the gradient penalty is taken between pairs of real and generated codes, which must "
            f"have the same shape, got {tuple(real.shape)} and {tuple(fake.shape)}."
        )
    device = real.device if generator is None else generator.device
    shares = torch.rand(len(real), 1, generator=generator, device=device).to(real)
    between = torch.lerp(fake.detach(), real.detach(), shares)
    slopes: Tensor = torch.linalg.vector_norm(_gradients(critic, between), dim=1)
    return (slopes - 1).square().mean()


def r1_penalty(critic: CriticFunction, real: Tensor) -> Tensor:
    """How steep the critic is at real codes.

    E |grad D(real)|^2 / 2                                              (Mescheder et al., 2018)

    Args:
        critic: the function D; computes each code apart from the others of its batch.
        real: codes of samples, shape (n, size).

    Returns:
        A scalar, to be weighted with gamma; it has a graph, of second derivatives.
    """
    return _gradients(critic, real.detach()).square().sum(1).mean() / 2


def _gradients(critic: CriticFunction, codes: Tensor) -> Tensor:
    """The critic's gradient at each code, shape (n, size), float32 or wider, with a graph."""
    codes = codes.clone().requires_grad_()
    with torch.enable_grad():
        (gradients,) = torch.autograd.grad(critic(codes).sum(), codes, create_graph=True)
    return gradients.to(torch.promote_types(gradients.dtype, torch.float32))


def _mean(values: Tensor) -> Tensor:
    """In float32 at least, also under autocast."""
    return values.mean(dtype=torch.promote_types(values.dtype, torch.float32))
