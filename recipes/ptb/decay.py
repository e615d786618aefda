"""The learning-rate rule of the paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class NonMonotonicDecay:
    """Divide the learning rate when validation has not improved for a while.

    After each validation: divide if its result is worse than the best of all earlier results but
    the last `patience` ones. Nothing is forgotten after a division, so a run of bad results
    divides again and again.

    Args:
        optimizer: whose learning rates are divided.
        divide_by: the divisor.
        patience: number of recent results that a new one is not compared with.

    Raises:
        ValueError: if `divide_by` is not above 1 or `patience` is negative.
    """

    def __init__(self, optimizer: Optimizer, divide_by: float = 4.0, patience: int = 5) -> None:
        if divide_by <= 1:
            raise ValueError(f"divide_by must be above 1 for rates to fall, got {divide_by}.")
        if patience < 0:
            raise ValueError(f"patience must be 0 or more validations, got {patience}.")
        self.optimizer = optimizer
        self.divide_by = divide_by
        self.patience = patience
        self.results: list[float] = []

    def step(self, result: float | Tensor) -> None:
        """Take in the result of a validation (lower is better) and divide the rates if need be."""
        earlier = self.results[: len(self.results) - self.patience]
        if len(self.results) > self.patience and float(result) > min(earlier):
            for group in self.optimizer.param_groups:
                group["lr"] /= self.divide_by
        self.results.append(float(result))

    def state_dict(self) -> dict[str, Any]:
        """The results so far; the rates themselves are in the state of the optimizer."""
        return {"results": list(self.results)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved results."""
        self.results = list(state_dict["results"])
