"""The perturbation dW of a weight as a differentiable function of mean and spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_revflip.flipout.noise import composing
from lightning_revflip.flipout.perturbations import Perturbation, Spread


class PerturbationSample(torch.autograd.Function):
    """dW as a function of mean and spread; the noise is drawn again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, perturbation: Perturbation, seed: int, mean: Tensor, *spread: Tensor
    ) -> Tensor:
        ctx.perturbation, ctx.seed = perturbation, seed
        ctx.save_for_backward(mean, *spread)
        return perturbation.sample(mean, spread, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        mean, *spread = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        _, grad_mean, grad_spread = ctx.perturbation.vjp(mean, spread, ctx.seed, grad)
        return None, None, grad_mean, *grad_spread


def sample(perturbation: Perturbation, seed: int | None, mean: Tensor, spread: Spread) -> Tensor:
    """The dW of a seed, differentiable with respect to mean and spread.

    Args:
        perturbation: of the weight.
        seed: of the noise. None: it is drawn from torch's global generators, as code under
            `torch.func` and `torch.compile` has to.
        mean: the weight.
        spread: its parameters.
    """
    if seed is None:
        return perturbation.scale(mean, *spread) * perturbation.noise(mean, None)
    if composing():
        noise: Tensor = _noise_outside_transforms(perturbation, seed, mean)
        return perturbation.scale(mean, *spread) * noise
    delta: Tensor = PerturbationSample.apply(perturbation, seed, mean, *spread)  # type: ignore[no-untyped-call]
    return delta


def _noise_outside_transforms(perturbation: Perturbation, seed: int, mean: Tensor) -> Tensor:
    """The noise of a seed in code that torch transforms, where `mean` may have no memory."""
    shape, dtype, device = mean.shape, mean.dtype, mean.device
    with torch._C._DisableFuncTorch():
        return perturbation.unit_noise(torch.empty(shape, dtype=dtype, device=device), seed)


# What torch.compiler.disable sets, without importing the compiler, which takes 2 s.
_noise_outside_transforms._torchdynamo_disable = True  # type: ignore[attr-defined]


def check_first_derivative() -> None:
    """Raise in a backward pass that is to be differentiated itself.

    torch's `once_differentiable` lets it through in silence where the incoming gradient requires
    none.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward through a flipout layer is not supported: its gradient cannot be "
            "differentiated again (create_graph=True). Use torch.func, sampling(model, 'mean'), or "
            "a plain layer for this."
        )
