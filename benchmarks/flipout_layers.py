"""What flipout layers cost: against plain layers of torch, and bayesian-torch where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import measure
from lightning_revflip.flipout import (
    FlipoutConv2d,
    FlipoutGRU,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    add_kl_gradient,
)

KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class Case:
    """One kind of layer and its input."""

    name: str
    plain: Callable[[], nn.Module]
    flipout: Callable[[], nn.Module]
    rival: str | None
    """Class in `bayesian_torch.layers`."""
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    limit: float | None = None
    """How many times the plain layer's time is allowed, if a limit is set."""


PERTURBATION = Gaussian(init_std=0.02)
CASES = [
    Case(
        "Linear 1024-1024, batch 128",
        lambda: nn.Linear(1024, 1024),
        lambda: FlipoutLinear(1024, 1024, perturbation=PERTURBATION),
        "LinearFlipout",
        (1024, 1024),
        (128, 1024),
        3.0,
    ),
    Case(
        "Conv2d 64-64 3x3, 32x32, batch 32",
        lambda: nn.Conv2d(64, 64, 3, padding=1),
        lambda: FlipoutConv2d(64, 64, 3, padding=1, perturbation=PERTURBATION),
        "Conv2dFlipout",
        (64, 64, 3, 1, 1),
        (32, 64, 32, 32),
        2.1,
    ),
    Case(
        "LSTM 256-256, 35 steps, batch 32",
        lambda: nn.LSTM(256, 256, batch_first=True),
        lambda: FlipoutLSTM(256, 256, batch_first=True, perturbation=PERTURBATION),
        "LSTMFlipout",
        (256, 256),
        (32, 35, 256),
        2.8,
    ),
    Case(
        "GRU 256-256, 35 steps, batch 32",
        lambda: nn.GRU(256, 256, batch_first=True),
        lambda: FlipoutGRU(256, 256, batch_first=True, perturbation=PERTURBATION),
        None,
        (256, 256),
        (32, 35, 256),
    ),
]


def measure_layers(budget: float) -> list[dict[str, Any]]:
    """A row per case: seconds of forward and backward pass with the gradient of the divergence."""
    return [_measure(case, budget) for case in CASES]


def _measure(case: Case, budget: float) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(case.shape, requires_grad=True)
    runs = {
        "plain": _pass(case.plain(), x),
        "flipout": _pass(case.flipout(), x, add_kl_gradient_to),
    }
    if case.rival and importlib.util.find_spec("bayesian_torch"):
        from bayesian_torch import layers

        runs["bayesian_torch"] = _pass_with_kl(getattr(layers, case.rival)(*case.arguments), x)
    times = {
        name: measure.summary(times) for name, times in measure.seconds(runs, budget, 5).items()
    }
    row: dict[str, Any] = {"layer": case.name, "limit": case.limit, "seconds": times}
    row["ratio"] = {
        name: time["median"] / times["plain"]["median"]
        for name, time in times.items()
        if name != "plain"
    }
    return row


def add_kl_gradient_to(layer: nn.Module) -> None:
    """What the callback `Flipout` does before the optimizer's step."""
    add_kl_gradient(layer, KL_WEIGHT)


def _pass(
    layer: nn.Module, x: Tensor, after: Callable[[nn.Module], None] | None = None
) -> Callable[[], None]:
    """Forward and backward pass of a layer that returns outputs, or a tuple with them first."""
    grad: list[Tensor] = []

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        found = layer(x)
        output = found[0] if isinstance(found, tuple) else found
        if not grad:
            grad.append(torch.randn_like(output))
        output.backward(grad[0])
        if after is not None:
            after(layer)

    return run


def _pass_with_kl(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """The same for a layer of bayesian-torch, which returns outputs first, divergence last."""
    grad: list[Tensor] = []

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        found = layer(x)
        output, divergence = found[0], found[-1]
        if not grad:
            grad.append(torch.randn_like(output))
        torch.autograd.backward([output, divergence * KL_WEIGHT], [grad[0], None])

    return run


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table("layer", "plain ms", "flipout", "limit", "bayesian-torch")
    for row in rows:
        rival = row["ratio"].get("bayesian_torch")
        shown.add_row(
            row["layer"],
            f"{1e3 * row['seconds']['plain']['median']:.2f}",
            f"{row['ratio']['flipout']:.2f}x",
            "" if row["limit"] is None else f"{row['limit']:.1f}x",
            "" if rival is None else f"{rival:.2f}x",
        )
    return shown
