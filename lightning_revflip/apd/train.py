"""How the generator and the critic of APD are trained, by each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_revflip.apd.losses import (
    critic_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
)
from lightning_revflip.apd.networks import Critic, Generator

Backward = Callable[[Tensor], None]
"""Adds the gradients of a loss to those of the parameters."""


class Steps(Protocol):
    """What is used of an optimizer: a torch.optim.Optimizer, or Lightning's wrapper of one."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Change the parameters by their gradients."""


class Adversaries(nn.Module):
    """A generator and a critic, and how each improves against the other.

    The critic minimizes E D(fake) - E D(real) + gradient_penalty GP + r1 R1, and the generator
    -E D(fake), see `losses.py`. `averaged` is the exponential moving average of the generator,
    which is steadier than the generator itself; its first steps average over fewer.

    Args:
        generator: makes codes.
        critic: judges them.
        gradient_penalty: weight lambda of the penalty of Gulrajani et al.; the paper has 10.
        r1: weight gamma of the penalty of Mescheder et al.
        ema: decay of the average of the generator, per step; None: `averaged` is the generator.

    Raises:
        ValueError: for negative weights, a decay outside [0, 1), and sizes that differ.

    Examples:
        >>> networks = Adversaries(Generator(2, 2, [8]), Critic(2, [8]))
        >>> critic, generator = networks.optimizers(lr=1e-3)
        >>> found = networks.step(torch.randn(5, 16, 2), critic, generator)
        >>> sorted(found)
        ['generator_loss', 'gradient_penalty', 'wasserstein']
    """

    def __init__(
        self,
        generator: Generator,
        critic: Critic,
        *,
        gradient_penalty: float = 10.0,
        r1: float = 0.0,
        ema: float | None = 0.999,
    ) -> None:
        super().__init__()
        if gradient_penalty < 0 or r1 < 0:
            raise ValueError(
                f"the weights of penalties must not be negative, got gradient_penalty="
                f"{gradient_penalty} and r1={r1}."
            )
        if ema is not None and not 0 <= ema < 1:
            raise ValueError(f"ema must be from 0 to below 1, or None, got {ema}.")
        self.generator = generator
        self.critic = critic
        self.gradient_penalty = gradient_penalty
        self.r1 = r1
        self.ema = ema
        self.generator_steps: Tensor
        self.register_buffer("generator_steps", torch.zeros((), dtype=torch.int64))
        self.average = None if ema is None else copy.deepcopy(generator).requires_grad_(False)

    @property
    def averaged(self) -> Generator:
        """The generator to sample from."""
        return self.generator if self.average is None else self.average

    def optimizers(
        self, lr: float = 1e-4, betas: tuple[float, float] = (0.5, 0.9)
    ) -> tuple[torch.optim.Adam, torch.optim.Adam]:
        """Adam for the critic, and for the generator; by default with the paper's settings.

        Args:
            lr: learning rate of both.
            betas: decays of their averages.
        """
        critic = torch.optim.Adam(self.critic.parameters(), lr=lr, betas=betas)
        generator = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas)
        return critic, generator

    def step(
        self,
        batches: Iterable[Tensor],
        critic_optimizer: Steps,
        generator_optimizer: Steps,
        random: torch.Generator | None = None,
        backward: Backward = Tensor.backward,
    ) -> dict[str, Tensor]:
        """One step of the critic on each batch, then one of the generator.

        Args:
            batches: real codes, each of shape (n, size): the paper has 5 of 100, all fresh.
            critic_optimizer: of the critic's parameters.
            generator_optimizer: of the generator's parameters.
            random: a CPU generator, draws latent vectors and interpolations; None: torch's global
                one.
            backward: computes gradients, such as `LightningModule.manual_backward`.

        Returns:
            What `improve_critic` on the last batch and `improve_generator` return.

        Raises:
            ValueError: for no batches.
        """
        found: dict[str, Tensor] = {}
        size = 0
        for real in batches:
            found = self.improve_critic(real, critic_optimizer, random, backward)
            size = len(real)
        if size == 0:
            raise ValueError("a step needs at least one batch of codes for the critic, got none.")
        return found | self.improve_generator(size, generator_optimizer, random, backward)

    def improve_critic(
        self,
        real: Tensor,
        optimizer: Steps,
        random: torch.Generator | None = None,
        backward: Backward = Tensor.backward,
    ) -> dict[str, Tensor]:
        """One step of the critic, on codes of samples and as many generated ones.

        Args:
            real: codes, shape (n, size), on the device of the networks.
            optimizer: of the critic's parameters.
            random: see `step`.
            backward: see `step`.

        Returns:
            Scalars: `wasserstein`, the estimate E D(real) - E D(fake), and `gradient_penalty` and
            `r1` before they are weighted, of those that are in use.
        """
        with torch.no_grad():
            fake = self.generator(self.generator.draw_latents(len(real), random)).to(real)
        loss = critic_loss(self.critic, real, fake)
        found = {"wasserstein": -loss.detach()}
        if self.gradient_penalty:
            penalty = gradient_penalty(self.critic, real, fake, random)
            loss = loss + self.gradient_penalty * penalty
            found["gradient_penalty"] = penalty.detach()
        if self.r1:
            penalty = r1_penalty(self.critic, real)
            loss = loss + self.r1 * penalty
            found["r1"] = penalty.detach()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        return found

    def improve_generator(
        self,
        n: int,
        optimizer: Steps,
        random: torch.Generator | None = None,
        backward: Backward = Tensor.backward,
    ) -> dict[str, Tensor]:
        """One step of the generator on `n` latent vectors, and of its average.

        Args:
            n: number of latent vectors.
            optimizer: of the generator's parameters.
            random: see `step`.
            backward: see `step`.

        Returns:
            `generator_loss`, a scalar.
        """
        with _frozen(self.critic):
            loss = generator_loss(
                self.critic, self.generator(self.generator.draw_latents(n, random))
            )
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
        self.generator_steps += 1
        self._update_average()
        return {"generator_loss": loss.detach()}

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None or self.ema is None:
            return
        steps = int(self.generator_steps)
        decay = min(self.ema, steps / (steps + 10))  # the first generators are soon forgotten
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, new in pairs:
            average.lerp_(new, 1 - decay)


def random_batches(
    codes: Tensor, batch_size: int, random: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Batches of codes without end: in each pass over them every code comes at most once.

    Args:
        codes: shape (K, size).
        batch_size: codes of a batch; all K if there are fewer.
        random: a CPU generator, draws the order of each pass; None: torch's global one.

    Raises:
        ValueError: for no codes, and a batch_size below 1; when the first batch is asked for.
    """
    if len(codes) == 0 or batch_size < 1:
        raise ValueError(
            "batches are made of at least one code, and batch_size must be at least 1, got "
            f"{len(codes)} codes and a batch_size of {batch_size}."
        )
    size = min(batch_size, len(codes))
    while True:
        order = torch.randperm(len(codes), generator=random)
        for start in range(0, len(codes) - size + 1, size):
            yield codes[order[start : start + size]]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of the module's parameters meanwhile; they still pass through it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
