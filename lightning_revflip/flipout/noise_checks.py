"""What noise has to be: repeatable from its generator, and symmetric where flipout negates it."""

from __future__ import annotations

import functools

import torch

from lightning_revflip.flipout.noise import seeded
from lightning_revflip.flipout.perturbations import (
    DropConnect,
    Gaussian,
    MultiplicativeGaussian,
    Perturbation,
)

_KNOWN = (Gaussian, MultiplicativeGaussian, DropConnect)
_TRIED = 65_536
_LARGEST_DISTANCE = 0.025


@functools.lru_cache(maxsize=64)
def check_repeatable(perturbation: Perturbation) -> None:
    """Raise if the noise of a perturbation does not follow from the generator that it is given.

    Raises:
        ValueError: also for noise of another shape or dtype than asked for.
    """
    if type(perturbation) in _KNOWN:
        return
    like = torch.empty(_TRIED, dtype=torch.float64)
    z, again = (perturbation.noise(like, seeded(0, like.device)) for _ in range(2))
    name = type(perturbation).__name__
    if z.shape != like.shape or z.dtype != like.dtype:
        raise ValueError(
            f"{name}.noise must return the shape and dtype of `like`, {tuple(like.shape)} and "
            f"{like.dtype}, got {tuple(z.shape)} and {z.dtype}."
        )
    if not torch.equal(z, again):
        raise ValueError(
            f"{name}.noise must draw from `generator`: generators of the same seed gave different "
            "numbers (or NaN), so the backward pass, which draws again, would not find the noise "
            "of the forward pass. Hand `generator` to what draws."
        )


@functools.lru_cache(maxsize=64)
def check_symmetric(perturbation: Perturbation) -> None:
    """Raise if the noise of a perturbation is not symmetric around 0 with variance 1.

    Looks at 65,536 numbers of a fixed seed, by the largest distance between the distribution of
    the noise and that of its negative: a symmetric one exceeds the limit in fewer than one of 10^9
    seeds.

    Raises:
        ValueError: saying what was found.
    """
    if type(perturbation) in _KNOWN:
        return
    like = torch.empty(_TRIED, dtype=torch.float64)
    z = perturbation.noise(like, seeded(0, like.device))
    name = type(perturbation).__name__
    grid = torch.cat([z, -z]).sort().values
    below = torch.searchsorted(z.sort().values, grid, right=True)
    below_negative = torch.searchsorted((-z).sort().values, grid, right=True)
    distance = float((below - below_negative).abs().max()) / _TRIED
    if distance > _LARGEST_DISTANCE:
        raise ValueError(
            f"{name}.noise is not symmetric around 0 (median {float(z.median()):.3g}, mean "
            f"{float(z.mean()):.3g}): its distribution and that of its negative differ by "
            f"{distance:.3f}. "
            "Flipout multiplies it by random signs, which would change its law. Subtract what "
            "makes it asymmetric into the mean weight, or perturb all examples alike: "
            "estimator='shared', and in `sampling` mode='shared'."
        )
    variance = float(z.square().mean())
    if not 0.8 < variance < 1.25:
        raise ValueError(
            f"{name}.noise must have variance 1, so that `scale` is the standard deviation of the "
            f"perturbation; it has {variance:.3g}. Divide the noise by {variance**0.5:.3g}, and "
            "multiply `scale` by it."
        )
