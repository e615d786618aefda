r"""Random perturbations of weights, dW = scale * noise, symmetric around 0 and independent.

Flipout (Wen, Vicol, Ba, Tran and Grosse, 2018, arXiv 1803.04386) multiplies one dW by signs that
differ from example to example. For the result to have the law of dW itself, the elements of dW
must be independent, and each as likely as its negative.

    Gaussian                  dW = softplus(rho) * e,   e ~ N(0, 1)      Bayes by backprop
    MultiplicativeGaussian    dW = std * mean * e,      e ~ N(0, 1)
    DropConnect               dW = mean * e,            e = -1 or +1     weights are 0 or 2 * mean

A perturbation of one's own is a subclass with `noise`, `scale` and, if `scale` has parameters,
`initial_spread`.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_revflip.flipout.divergence import (
    add_gaussian_kl_gradient,
    gaussian_kl,
    inverse_softplus,
    softplus,
)
from lightning_revflip.flipout.noise import LIBRARY, native, normal, seeded, signs

Spread = Sequence[Tensor]
"""The parameters of `scale` for one weight, each of the shape of the weight."""


class Perturbation(ABC):
    """How weights are perturbed; holds settings only, parameters belong to the layers.

    A subclass keeps each argument of its constructor as an attribute of the same name, from which a
    checkpoint builds it again.
    """

    spread_names: tuple[str, ...] = ()
    """Suffixes of the parameters that each perturbed weight gets, such as `rho`."""
    is_gaussian: ClassVar[bool] = False
    """Whether the noise is standard normal, so that sums of it are known in closed form."""
    depends_on_mean: ClassVar[bool] = True
    """Whether `scale` depends on the mean; False saves time."""

    @abstractmethod
    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Independent symmetric numbers with mean 0 and variance 1.

        Args:
            like: has the shape, dtype and device of the result.
            generator: to draw from, of the same device; None: torch's global one.

        Returns:
            In the shape, dtype and device of `like`.
        """

    @abstractmethod
    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        """What noise is multiplied by, differentiable; its size is the standard deviation of dW.

        Args:
            mean: the weight without perturbation.
            spread: the parameters in `spread_names`, each in its shape.

        Returns:
            In the shape of the weight.
        """

    def initial_spread(self, mean: Tensor) -> list[Tensor]:
        """Initial values of the parameters in `spread_names`.

        Args:
            mean: the weight.

        Returns:
            One tensor for each, in the shape of the weight.
        """
        return []

    @property
    def has_prior(self) -> bool:
        """Whether `kl` returns a divergence."""
        return False

    def kl(self, mean: Tensor, *spread: Tensor) -> Tensor | None:
        """Divergence of the weights' distribution from the prior.

        Args:
            mean: the weight.
            spread: its parameters.

        Returns:
            A scalar in nats, the sum over all weights; None without a prior.
        """
        return None

    def add_kl_gradient(self, mean: Tensor, spread: Spread, weight: float) -> Tensor | None:
        """Add `weight` times the gradient of `kl` to `.grad` of the parameters.

        Args:
            mean: the weight.
            spread: its parameters.
            weight: factor of the gradient.

        Returns:
            What `kl` returns, without a graph.
        """
        wanted = [parameter for parameter in (mean, *spread) if parameter.requires_grad]
        with torch.enable_grad():
            value = self.kl(mean, *spread)
        if value is None or not wanted:
            return value if value is None else value.detach()
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if value.requires_grad:
            grads = torch.autograd.grad(value, wanted, allow_unused=True)
        for parameter, grad in zip(wanted, grads, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(grad, alpha=weight)
        return value.detach()

    # --- what layers call --------------------------------------------------------------------

    def unit_noise(self, like: Tensor, seed: int) -> Tensor:
        """The noise of a seed, in the shape, dtype and device of `like`."""
        return self.noise(like, seeded(seed, like.device))

    def sample(self, mean: Tensor, spread: Spread, seed: int) -> Tensor:
        """The dW of a seed; not differentiable, see `vjp`.

        Args:
            mean: the weight.
            spread: its parameters.
            seed: of the noise.
        """
        return self.scale(mean, *spread) * self.unit_noise(mean, seed)

    def vjp(
        self, mean: Tensor, spread: Spread, seed: int, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """The dW of a seed again, and the gradients by what it depends on.

        Args:
            mean: the weight.
            spread: its parameters.
            seed: that `sample` got.
            grad: gradient by dW, in the dtype of `mean`; may be overwritten.

        Returns:
            dW, the gradient by `mean` (None for zero), and those by `spread`; all may be
            overwritten.
        """
        noise = self.unit_noise(mean, seed)
        leaves = [tensor.detach().requires_grad_() for tensor in (mean, *spread)]
        with torch.enable_grad():
            scale = self.scale(*leaves)
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if scale.requires_grad:
            grads = torch.autograd.grad(scale, leaves, grad * noise, allow_unused=True)
        # Autograd may give several inputs one and the same tensor, or an expanded one.
        own = [part if part is None else part.clone() for part in grads]
        return scale.detach() * noise, own[0], own[1:]

    def to_config(self) -> dict[str, Any]:
        """Import path and arguments, with which `cls(**init_args)` makes the same again."""
        cls = type(self)
        return {
            "class_path": f"{cls.__module__}:{cls.__qualname__}",
            "init_args": dict(self._arguments()),
        }

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, which attributes of the same names hold."""
        names = inspect.signature(type(self)).parameters
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise ValueError(
                f"{type(self).__name__} must keep the arguments of its constructor as attributes "
                f"of the same names, from which a checkpoint builds it again; there is no "
                f"{', '.join(missing)}."
            )
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))  # arguments may be lists

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"


class _StandardNormal(Perturbation):
    """What has Gaussian noise."""

    is_gaussian = True

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        kind: Any = {"dtype": like.dtype, "device": like.device}
        return torch.randn(like.shape, generator=generator, **kind)

    def unit_noise(self, like: Tensor, seed: int) -> Tensor:
        return normal(like, seed)


class Gaussian(_StandardNormal):
    """Weights are independent normal, W ~ N(mean, std^2), with prior N(0, prior_std^2).

    Bayes by backprop (Blundell et al., 2015, arXiv 1505.05424): each weight has a parameter `rho`
    with std = softplus(rho), which is learned. The divergence from the prior is exact, see
    `divergence.py`.

    Args:
        init_std: initial standard deviation of all weights.
        prior_std: standard deviation (not variance) of the prior; None: no prior, only noise.
        learnable: whether standard deviations are parameters; else all stay `init_std`, and there
            is nothing to hold against a prior.

    Raises:
        ValueError: for a standard deviation that is not positive and finite.

    Examples:
        >>> Gaussian(init_std=0.02)
        Gaussian(init_std=0.02, prior_std=1.0, learnable=True)
    """

    depends_on_mean = False

    def __init__(
        self, init_std: float = 0.05, prior_std: float | None = 1.0, learnable: bool = True
    ) -> None:
        self.init_std = _positive("init_std", init_std)
        self.prior_std = None if prior_std is None else _positive("prior_std", prior_std)
        self.learnable = learnable
        self.spread_names = ("rho",) if learnable else ()

    def initial_spread(self, mean: Tensor) -> list[Tensor]:
        if not self.learnable:
            return []
        return [torch.full_like(mean, inverse_softplus(self.init_std))]

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return softplus(spread[0]) if spread else torch.full_like(mean, self.init_std)

    def sample(self, mean: Tensor, spread: Spread, seed: int) -> Tensor:
        if not spread:
            return normal(mean, seed).mul_(self.init_std)
        (rho,) = spread
        if native(rho):
            out = torch.empty_like(rho)
            LIBRARY.call("gaussian", rho.numel(), seed, rho, out)
            return out
        return normal(rho, seed).mul_(softplus(rho))

    def vjp(
        self, mean: Tensor, spread: Spread, seed: int, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        if not spread:
            return self.sample(mean, spread, seed), None, []
        (rho,) = spread
        if native(rho, grad):
            out = torch.empty_like(rho)
            LIBRARY.call("gaussian_vjp", rho.numel(), seed, rho, grad, out)
            return out, None, [grad]
        noise = normal(rho, seed)
        return noise * softplus(rho), None, [grad * noise * rho.sigmoid()]

    @property
    def has_prior(self) -> bool:
        return self.learnable and self.prior_std is not None

    def kl(self, mean: Tensor, *spread: Tensor) -> Tensor | None:
        if self.prior_std is None or not spread:
            return None
        return gaussian_kl(mean, spread[0], self.prior_std)

    def add_kl_gradient(self, mean: Tensor, spread: Spread, weight: float) -> Tensor | None:
        learned = all(tensor.requires_grad for tensor in (mean, *spread))
        if self.prior_std is None or not spread or not learned:
            return super().add_kl_gradient(mean, spread, weight)
        return add_gaussian_kl_gradient(mean, spread[0], self.prior_std, weight)


class MultiplicativeGaussian(_StandardNormal):
    """Weights are multiplied by independent normal numbers, W ~ mean * N(1, std^2).

    The gradient reaches the mean through both. Noise only, without a prior: `kl` leaves it out.

    Args:
        std: standard deviation relative to the mean.

    Raises:
        ValueError: for `std` that is not positive and finite.
    """

    def __init__(self, std: float = 0.1) -> None:
        self.std = _positive("std", std)

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return mean * self.std

    def sample(self, mean: Tensor, spread: Spread, seed: int) -> Tensor:
        return self._times_noise(mean, seed)

    def vjp(
        self, mean: Tensor, spread: Spread, seed: int, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        return self._times_noise(mean, seed), self._times_noise(grad, seed), []

    def _times_noise(self, x: Tensor, seed: int) -> Tensor:
        if native(x):
            out = torch.empty_like(x)
            LIBRARY.call("normal_times", x.numel(), seed, x, self.std, out)
            return out
        return normal(x, seed).mul_(x).mul_(self.std)


class DropConnect(Perturbation):
    """Each weight is dropped with probability 1/2, else doubled (Wan et al., 2013).

    The mean weight is that of `eval()`. Noise only, without a prior: `kl` leaves it out.

    Args:
        p: probability of dropping a weight; only 0.5 is symmetric around the mean.

    Raises:
        ValueError: for another `p`.
    """

    def __init__(self, p: float = 0.5) -> None:
        if p != 0.5:
            raise ValueError(
                f"DropConnect works with flipout at p=0.5 alone, got p={p}: flipout negates "
                "perturbations, and dropping (dW = -W) is as likely as the opposite (dW = +W) only "
                "there. Use p=0.5, or MultiplicativeGaussian(std) for weaker noise."
            )
        self.p = p

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        bits = torch.randint(2, like.shape, generator=generator, device=like.device)
        return (1 - 2 * bits).to(like.dtype)

    def unit_noise(self, like: Tensor, seed: int) -> Tensor:
        return signs(like.shape, seed, like.dtype, like.device)

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return mean

    def sample(self, mean: Tensor, spread: Spread, seed: int) -> Tensor:
        return self._times_signs(mean, seed)

    def vjp(
        self, mean: Tensor, spread: Spread, seed: int, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        return self._times_signs(mean, seed), self._times_signs(grad, seed), []

    def _times_signs(self, x: Tensor, seed: int) -> Tensor:
        if native(x):
            out = torch.empty_like(x)
            LIBRARY.call("signs_times", x.numel(), seed, x, out)
            return out
        return self.unit_noise(x, seed).mul_(x)


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{name} must be a positive standard deviation, got {value}. "
            "For no noise, do not convert the layer."
        )
    return float(value)
