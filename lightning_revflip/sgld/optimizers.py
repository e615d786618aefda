"""Samplers of the posterior: SGLD, preconditioned SGLD and SGHMC; `base.py` states of what."""

from __future__ import annotations

import math
from itertools import compress
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lightning_revflip.sgld import native
from lightning_revflip.sgld.base import LangevinOptimizer, Moving
from lightning_revflip.sgld.checks import check_share


class SGLD(LangevinOptimizer):
    """Stochastic gradient Langevin dynamics (Welling and Teh, ICML 2011).

        theta <- theta - lr / 2 (grad L + prior_precision / N theta) + N(0, lr T / N)

    The step size makes the samples spread too far: in a direction where L has the curvature a, the
    variance is T / (N a) times 1 / (1 - lr a / 4), plus that of the gradients of minibatches, whose
    noise counts lr N / (4 T) times its variance. Both vanish with lr.
    """

    def update(self, moving: Moving) -> None:
        group = moving.group
        drift = float(group["lr"]) / 2
        decay = group["prior_precision"] / group["num_data"]
        scale = math.sqrt(group["lr"] * group["temperature"] / group["num_data"])

        lists = (moving.params, moving.grads)
        if native.takes(*lists):
            native.call("sgld", lists, moving.seed, decay, drift, scale)
            return
        # Noise and drift are added as one number: alone, a small drift would be rounded away.
        step = torch._foreach_mul(moving.grads, -drift)
        torch._foreach_add_(step, moving.params, alpha=-drift * decay)
        if (noise := moving.noise()) is not None:
            torch._foreach_add_(step, noise, alpha=scale)
        torch._foreach_add_(moving.params, step)


class PSGLD(LangevinOptimizer):
    """SGLD with the diagonal preconditioner of RMSprop (Li et al., AAAI 2016, arXiv 1512.07666).

        V <- smoothing V + (1 - smoothing) g^2,    g = grad L
        G = 1 / (stabilizer + sqrt(V / (1 - smoothing^t)))
        theta <- theta - lr / 2 G (g + prior_precision / N theta) + N(0, lr G T / N)

    A step uses the V of the gradients before its own (the first step has only its own), so that G
    and g are not correlated by the noise of a batch. While G adapts to where the chain is, the
    samples are not those of the posterior; the correction for it is costly, and left out in the
    paper and here. So G is fixed after `adaptation_steps`: count these as burn-in.

    Args:
        params: as for all samplers, like the arguments that are not named here.
        lr: step size, of the order of one for RMSprop.
        num_data: number N of training examples.
        smoothing: how slowly V forgets.
        stabilizer: lambda of the paper.
        adaptation_steps: steps of each parameter after which its V stays. None: never, as in the
            paper.
    """

    state_names = ("square_average",)
    setting_names = ("smoothing", "stabilizer", "adaptation_steps")

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        num_data: int,
        smoothing: float = 0.99,
        stabilizer: float = 1e-5,
        adaptation_steps: int | None = 1000,
        **settings: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            num_data=num_data,
            smoothing=smoothing,
            stabilizer=stabilizer,
            adaptation_steps=adaptation_steps,
            **settings,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check_share("smoothing", group["smoothing"], zero=True, one=False)
        stabilizer, steps = group["stabilizer"], group["adaptation_steps"]
        if not 0 < stabilizer < math.inf:
            raise ValueError(f"stabilizer must be a positive number, got {stabilizer}.")
        if steps is not None and steps < 1:
            raise ValueError(
                f"adaptation_steps must be at least 1, or None for no end, got {steps}."
            )
        super().add_param_group(param_group)

    def update(self, moving: Moving) -> None:
        group = moving.group
        smoothing, stabilizer = group["smoothing"], group["stabilizer"]
        drift = float(group["lr"]) / 2
        decay = group["prior_precision"] / group["num_data"]
        scale = math.sqrt(group["lr"] * group["temperature"] / group["num_data"])
        averages = moving.states["square_average"]
        end = math.inf if group["adaptation_steps"] is None else group["adaptation_steps"]
        seen = [max(1, min(steps, end)) for steps in moving.steps]  # gradients in V
        weights = [1 / (1 - smoothing**count) for count in seen]
        learns = [
            _BEFORE if step == 0 else _AFTER if step < end else _NEVER for step in moving.steps
        ]

        lists = (moving.params, moving.grads, averages)
        if native.takes(*lists):
            numbers = (smoothing, stabilizer, decay, drift, scale)
            of_tensors = (weights, learns)
            native.call("psgld", lists, moving.seed, *numbers, of_tensors=of_tensors)
            return
        _learn(moving, [when == _BEFORE for when in learns])
        preconditioner = torch._foreach_mul(averages, weights)
        torch._foreach_sqrt_(preconditioner)
        torch._foreach_add_(preconditioner, stabilizer)
        torch._foreach_reciprocal_(preconditioner)

        step = torch._foreach_mul(moving.params, decay)
        torch._foreach_add_(step, moving.grads)
        torch._foreach_mul_(step, preconditioner)
        torch._foreach_mul_(step, -drift)
        if (noise := moving.noise()) is not None:
            torch._foreach_sqrt_(preconditioner)
            torch._foreach_mul_(noise, preconditioner)
            torch._foreach_add_(step, noise, alpha=scale)
        torch._foreach_add_(moving.params, step)
        _learn(moving, [when == _AFTER for when in learns])


_BEFORE, _AFTER, _NEVER = range(3)  # when V learns from a gradient, relative to its use


def _learn(moving: Moving, chosen: list[bool]) -> None:
    """Put the gradients of chosen parameters into V."""
    grads = list(compress(moving.grads, chosen))
    averages = list(compress(moving.states["square_average"], chosen))
    if grads:
        smoothing = moving.group["smoothing"]
        torch._foreach_mul_(averages, smoothing)
        torch._foreach_addcmul_(averages, grads, grads, 1 - smoothing)


class SGHMC(LangevinOptimizer):
    """Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin, ICML 2014).

    Langevin dynamics with a momentum, which moves on where SGLD walks at random. With c = 1 -
    friction and the velocity v:

        v <- v - lr (grad L + prior_precision / N theta)
        theta <- theta + v / 2
        v <- c v + N(0, (1 - c^2) lr T / N)
        theta <- theta + v / 2

    This order of halves (BAOAB: Leimkuhler and Matthews, 2013) costs one gradient and one draw, as
    the paper's does, and the step size leaves no bias where the posterior is Gaussian. The noise of
    minibatches remains, and is damped by friction.

    With friction = 1 a step is as long as one of `SGLD` with the same lr; small friction goes about
    (2 - friction) / friction times as far in the long run.

    Args:
        params: as for all samplers, like the arguments that are not named here.
        lr: step size.
        num_data: number N of training examples.
        friction: share of the velocity that is lost in a step, in (0, 1]; 0.1 compares with a
            momentum of 0.9.
    """

    state_names = ("velocity",)
    setting_names = ("friction",)

    def __init__(
        self, params: ParamsT, lr: float, *, num_data: int, friction: float = 0.1, **settings: Any
    ) -> None:
        super().__init__(params, lr, num_data=num_data, friction=friction, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check_share("friction", group["friction"], zero=False, one=True)
        super().add_param_group(param_group)

    def update(self, moving: Moving) -> None:
        group = moving.group
        lr, kept = float(group["lr"]), 1 - group["friction"]
        decay = group["prior_precision"] / group["num_data"]
        scale = math.sqrt((1 - kept**2) * lr * group["temperature"] / group["num_data"])
        velocity = moving.states["velocity"]
        # A velocity is a distance per step, whose spread grows with sqrt(lr).
        before = group.setdefault("velocity_lr", lr)
        if lr != before:
            torch._foreach_mul_(velocity, math.sqrt(lr / before) if before > 0 else 0.0)
            group["velocity_lr"] = lr

        lists = (moving.params, moving.grads, velocity)
        if native.takes(*lists):
            native.call("sghmc", lists, moving.seed, lr, decay, kept, scale)
            return
        torch._foreach_add_(velocity, moving.grads, alpha=-lr)
        torch._foreach_add_(velocity, moving.params, alpha=-lr * decay)
        torch._foreach_add_(moving.params, velocity, alpha=0.5)
        torch._foreach_mul_(velocity, kept)
        if (noise := moving.noise()) is not None:
            torch._foreach_add_(velocity, noise, alpha=scale)
        torch._foreach_add_(moving.params, velocity, alpha=0.5)
