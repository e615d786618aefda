"""Kullback-Leibler divergence of N(mean, softplus(rho)^2) from N(0, prior_std^2), in closed form.

    KL = sum over weights of  log(prior_std / std) + (std^2 + mean^2) / (2 prior_std^2) - 1/2
    dKL/dmean = mean / prior_std^2
    dKL/drho  = sigmoid(rho) * (std / prior_std^2 - 1 / std)

Where rho is far below 0, std underflows; log std and sigmoid(rho) / std are formed so that they do
not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_revflip.flipout.noise import LIBRARY, composing, native

_FAR = -40.0
"""Below this, softplus(rho) = exp(rho) to float64 accuracy."""


def softplus(rho: Tensor) -> Tensor:
    """log(1 + exp(rho)), to float64 accuracy too."""
    return F.softplus(rho, threshold=40.0)


def inverse_softplus(std: float) -> float:
    """The rho whose softplus is `std`."""
    return float(std + torch.log(-torch.expm1(torch.tensor(-std, dtype=torch.float64))))


def log_softplus(rho: Tensor) -> Tensor:
    """log(softplus(rho)), finite where softplus(rho) is not above 0."""
    return softplus(rho.clamp_min(_FAR)).log() + (rho.clamp_max(_FAR) - _FAR)


def gaussian_kl(mean: Tensor, rho: Tensor, prior_std: float) -> Tensor:
    """The divergence, differentiable, a scalar in nats."""
    if composing():
        return _formula(mean, rho, prior_std)
    divergence: Tensor = _GaussianKL.apply(mean, rho, prior_std)  # type: ignore[no-untyped-call]
    return divergence


def add_gaussian_kl_gradient(mean: Tensor, rho: Tensor, prior_std: float, weight: float) -> Tensor:
    """Add `weight` times the gradient to `.grad` of both, in one pass; returns the divergence."""
    for parameter in (mean, rho):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert mean.grad is not None
    assert rho.grad is not None
    with torch.no_grad():
        if native(mean, rho, mean.grad, rho.grad):
            arguments = (mean, rho, prior_std, weight, mean.grad, rho.grad)
            return torch.tensor(LIBRARY.call("gaussian_kl_vjp", mean.numel(), *arguments))
        grad_mean, grad_rho = _gradients(mean, rho, prior_std)
        mean.grad.add_(grad_mean, alpha=weight)
        rho.grad.add_(grad_rho, alpha=weight)
        return _formula(mean, rho, prior_std)


def _formula(mean: Tensor, rho: Tensor, prior_std: float) -> Tensor:
    mean, rho = _wide(mean), _wide(rho)
    squares = (softplus(rho).square() + mean.square()) / prior_std**2
    return (0.5 * (squares - 1) - log_softplus(rho)).sum() + mean.numel() * _log(prior_std)


def _gradients(mean: Tensor, rho: Tensor, prior_std: float) -> tuple[Tensor, Tensor]:
    wide = _wide(rho)
    pull = (F.logsigmoid(wide) - log_softplus(wide)).exp()
    grad_rho = wide.sigmoid() * softplus(wide) / prior_std**2 - pull
    return mean / prior_std**2, grad_rho.to(rho.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32: a sum over many weights exceeds float16, and bfloat16 has two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())


class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, rho: Tensor, prior_std: float) -> Tensor:
        ctx.save_for_backward(mean, rho)
        ctx.prior_std = prior_std
        if native(mean, rho):
            return torch.tensor(LIBRARY.call("gaussian_kl", mean.numel(), mean, rho, prior_std))
        return _formula(mean, rho, prior_std)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, rho = ctx.saved_tensors
        if native(mean, rho) and not torch.is_grad_enabled():
            grads = torch.zeros_like(mean), torch.zeros_like(rho)
            arguments = (mean, rho, ctx.prior_std, float(grad), *grads)
            LIBRARY.call("gaussian_kl_vjp", mean.numel(), *arguments)
            return (*grads, None)
        grad_mean, grad_rho = _gradients(mean, rho, ctx.prior_std)
        return grad * grad_mean, grad * grad_rho, None
