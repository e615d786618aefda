"""Checks of what the samplers are given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_group(group: Mapping[str, Any]) -> None:
    """Raise unless the settings of a parameter group are in range.

    Raises:
        ValueError: naming the setting, what it is and what it may be.
    """
    check_num_data(group["num_data"])
    lr = group["lr"]
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr}.")
    check_temperature(group["temperature"])
    precision = group["prior_precision"]
    if not 0 <= precision < math.inf:
        raise ValueError(
            f"prior_precision must be a number from 0, got {precision}. It is 1 / variance of the "
            "prior, 0 for none."
        )


def check_temperature(temperature: float) -> None:
    """Raise unless this is a temperature."""
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be a number from 0, got {temperature}. 1 samples from the posterior "
            "of Bayes, 0 leaves out the noise."
        )


def check_num_data(num_data: object) -> None:
    """Raise unless this is a number of training examples."""
    if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < 1:
        raise ValueError(
            f"num_data must be the number of training examples, a whole number from 1, got "
            f"{num_data!r}. It is len(train_dataset), and sets the scale of prior and noise."
        )


def check_parameters(params: Iterable[Tensor], flat: bool) -> None:
    """Raise unless these parameters of one group can be sampled."""
    kinds = {(each.dtype, each.device) for each in params}
    for dtype, _ in kinds:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameters must be float32 or float64, got {dtype}. (16 bits would round away "
                "the small steps of a sampler: use mixed precision, which keeps parameters in "
                "float32.)"
            )
    if flat and len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(
            f"flat=True needs one dtype and device in each group of parameters, got {found}. Make "
            "a group of each kind, or leave it out."
        )


def check_gradients(params: Iterable[Tensor]) -> None:
    """Raise if a gradient is sparse: the prior and the noise move every weight."""
    if any(each.grad is not None and each.grad.is_sparse for each in params):
        raise ValueError(
            "a gradient is sparse, but prior and noise move every weight in every step. Use "
            "sparse=False in nn.Embedding."
        )


def check_share(name: str, value: float, *, zero: bool, one: bool) -> None:
    """Raise unless a value lies between 0 and 1; `zero` and `one` say which ends are included."""
    if not ((0 < value < 1) or (zero and value == 0) or (one and value == 1)):
        left, right = "[" if zero else "(", "]" if one else ")"
        raise ValueError(f"{name} must lie in {left}0, 1{right}, got {value}.")
