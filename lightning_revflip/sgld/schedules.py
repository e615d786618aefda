"""Step sizes that change while a sampler runs, as torch schedulers: call `step` after each step."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class PolynomialSchedule(LRScheduler):
    """Step sizes that fall fast enough to remove the bias, and slowly enough to reach everything.

        lr_t = a (b + t)^-gamma,    t = 0, 1, ...

    With gamma in (1/2, 1] the sum of lr_t is infinite and that of lr_t^2 finite (Welling and Teh,
    ICML 2011). Samples then stand for different spans of time; constant steps are more usual.

    Args:
        optimizer: a sampler; its learning rate is replaced.
        a: scale.
        b: how many steps the first ones resemble.
        gamma: how fast step sizes fall.
        last_epoch: the last step of a schedule that goes on; -1 for a new one.

    Raises:
        ValueError: for `a` or `b` that are not positive, and `gamma` outside (0, 1].
    """

    def __init__(
        self, optimizer: Optimizer, a: float, b: float, gamma: float = 0.55, last_epoch: int = -1
    ) -> None:
        for name, value in (("a", a), ("b", b)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}.")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {gamma}; 0.55 is usual.")
        self.a = a
        self.b = b
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The step size, the same for each group."""
        rate = self.a * (self.b + self.last_epoch) ** -self.gamma
        return [rate for _ in self.optimizer.param_groups]


class CyclicalSchedule(LRScheduler):
    """Step sizes that start large again in every cycle, to find other modes of the posterior.

        lr_t = lr_0 / 2 (cos(pi r_t) + 1),    r_t = (t mod cycle_steps) / cycle_steps

    While r_t < exploration, the temperature of the groups is 0 and samples should not be taken;
    then it returns to `initial_temperature` (Zhang et al., ICLR 2020, arXiv 1902.03932).

    Args:
        optimizer: a sampler, whose learning rate is lr_0.
        cycle_steps: number of steps of a cycle.
        exploration: share of a cycle, in [0, 1).
        last_epoch: the last step of a schedule that goes on; -1 for a new one.

    Raises:
        ValueError: for a cycle shorter than 1 step, and a share outside [0, 1).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_steps: int,
        exploration: float = 0.8,
        last_epoch: int = -1,
    ) -> None:
        if cycle_steps < 1:
            raise ValueError(f"cycle_steps must be at least 1, got {cycle_steps}.")
        if not 0 <= exploration < 1:
            raise ValueError(
                f"exploration must lie in [0, 1), got {exploration}: with 1, no step would sample."
            )
        if (cycle_steps - 1) / cycle_steps < exploration:
            raise ValueError(
                f"no step of a cycle of {cycle_steps} would sample with exploration {exploration}. "
                "Use longer cycles, or explore less."
            )
        self.cycle_steps = cycle_steps
        self.exploration = exploration
        super().__init__(optimizer, last_epoch)

    @property
    def position(self) -> float:
        """r_t of the next step of the optimizer, in [0, 1)."""
        step = max(self.last_epoch, 0)  # -1 in a SequentialLR that has not come to it
        return step % self.cycle_steps / self.cycle_steps

    @property
    def sampling(self) -> bool:
        """Whether the next step of the optimizer samples, rather than explores."""
        return self.position >= self.exploration

    def get_lr(self) -> list[Any]:
        """The step size of each group."""
        share = (math.cos(math.pi * self.position) + 1) / 2
        return [base * share for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.set_temperatures()

    def set_temperatures(self) -> None:
        """Give the optimizer the temperature of its next step; `step` calls it."""
        for group in self.optimizer.param_groups:
            if "temperature" in group:  # else the schedule was made for what a sampler replaces
                initial = group.setdefault("initial_temperature", group["temperature"])
                group["temperature"] = initial if self.sampling else 0.0
