"""Langevin samplers in plain formulas, with the noise handed in.

The loss L is a mean over the examples, N their number, T the temperature and p the precision of a
normal prior, so that the posterior is exp(-U / T) with U = N L + p/2 |theta|^2. All in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_revflip.sgld.native import LIBRARY

# --- steps ----------------------------------------------------------------------------------------


class ReferenceSGLD:
    """theta <- theta - lr/2 (grad L + p/N theta) + N(0, lr T/N)        (Welling and Teh, 2011)"""

    def __init__(
        self,
        theta: Tensor,
        lr: float,
        *,
        num_data: float,
        temperature: float = 1.0,
        prior_precision: float = 0.0,
    ) -> None:
        self.theta = theta.detach().double().clone()
        self.lr = lr
        self.decay = prior_precision / num_data
        self.variance = lr * temperature / num_data

    def step(self, gradient: Tensor, noise: Tensor) -> None:
        drift = gradient + self.decay * self.theta
        self.theta = self.theta - self.lr / 2 * drift + self.variance**0.5 * noise

    def noise_of(self, move: Tensor) -> Tensor:
        """The standard normal numbers behind a step of this size without gradient and prior."""
        return move / self.variance**0.5


class ReferencePSGLD(ReferenceSGLD):
    """SGLD whose step and noise are scaled by G = 1 / (stabilizer + RMS of past gradients).

    A step uses the mean square from before its own gradient, but for the first (Li et al., 2016).
    """

    def __init__(
        self,
        theta: Tensor,
        lr: float,
        *,
        smoothing: float = 0.99,
        stabilizer: float = 1e-5,
        adaptation_steps: int | None = 1000,
        **settings: float,
    ) -> None:
        super().__init__(theta, lr, **settings)
        self.smoothing, self.stabilizer = smoothing, stabilizer
        self.adaptation_steps = adaptation_steps
        self.steps = 0
        self.squares: list[Tensor] = []

    def step(self, gradient: Tensor, noise: Tensor) -> None:
        used = self.squares or [gradient.square()]
        G = 1 / (self.stabilizer + self._mean(used).sqrt())
        drift = gradient + self.decay * self.theta
        self.theta = self.theta - self.lr / 2 * G * drift + (self.variance * G).sqrt() * noise
        if self.adaptation_steps is None or len(self.squares) < self.adaptation_steps:
            self.squares.append(gradient.square())

    def _mean(self, squares: list[Tensor]) -> Tensor:
        """Weighted mean; the weight falls by `smoothing` with each step into the past."""
        weights = [self.smoothing**age for age in range(len(squares))]
        terms = zip(weights, reversed(squares), strict=True)
        return torch.stack([weight * square for weight, square in terms]).sum(0) / sum(weights)

    def noise_of(self, move: Tensor) -> Tensor:
        return super().noise_of(move) * self.stabilizer**0.5


class ReferenceSGHMC(ReferenceSGLD):
    """Kick, half a move, friction and noise, half a move; v has variance lr T/N.

    With c = 1 - friction: v <- v - lr (grad L + p/N theta); theta += v/2;
    v <- c v + N(0, (1 - c^2) lr T/N); theta += v/2     (Chen et al., 2014, split as BAOAB)
    """

    def __init__(
        self, theta: Tensor, lr: float, *, friction: float = 0.1, **settings: float
    ) -> None:
        super().__init__(theta, lr, **settings)
        self.kept = 1 - friction
        self.variance *= 1 - self.kept**2
        self.velocity = torch.zeros_like(self.theta)

    def step(self, gradient: Tensor, noise: Tensor) -> None:
        self.velocity = self.velocity - self.lr * (gradient + self.decay * self.theta)
        self.theta = self.theta + self.velocity / 2
        self.velocity = self.kept * self.velocity + self.variance**0.5 * noise
        self.theta = self.theta + self.velocity / 2

    def noise_of(self, move: Tensor) -> Tensor:
        before = self.velocity
        self.velocity = 2 * move - before  # the move is the mean of both velocities
        return (self.velocity - self.kept * before) / self.variance**0.5


# --- the noise of a sampler -----------------------------------------------------------------------


def drawn_noise(
    sampler: Callable[..., torch.optim.Optimizer],
    reference: type[ReferenceSGLD],
    parameters: Sequence[Tensor],
    steps: int,
    *,
    flat: bool = False,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> list[list[Tensor]]:
    """The standard normal numbers that a sampler draws: its moves without gradient and prior.

    Returns:
        For each step, one tensor for each of `parameters`, which are only looked at.
    """
    settings = settings | {"prior_precision": 0.0}
    copies = [torch.zeros_like(each).requires_grad_() for each in parameters]
    optimizer = sampler(copies, flat=flat, generator=generator, **settings)
    references = [reference(each, **settings) for each in copies]
    noise = []
    for _ in range(steps):
        before = [each.detach().clone() for each in copies]
        for each in copies:
            each.grad = torch.zeros_like(each)
        optimizer.step()
        pairs = zip(references, copies, before, strict=True)
        noise.append([truth.noise_of(each.detach().double() - old) for truth, each, old in pairs])
    return noise


@contextmanager
def without_compiler() -> Iterator[None]:
    """Torch alone takes the steps, as where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REVFLIP_NATIVE", "0")
        LIBRARY.unload()
        yield
    LIBRARY.unload()
