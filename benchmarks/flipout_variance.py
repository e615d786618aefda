"""Variance of gradients against batch size: shared, flipout, local reparameterization, independent.

With N examples per batch, the variance of a mean gradient is alpha / N for independent weights and
alpha / N + beta for shared ones; flipout's beta is much smaller (Wen et al., 2018, section 3). The
noise of the weights dominates here: data vary too, but their part falls with 1 / N for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from lightning_revflip.flipout import (
    FlipoutConv2d,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    PerturbedLayer,
)

STD = 0.1
PERTURBATION = Gaussian(init_std=STD)
BATCHES = [1, 4, 16, 64, 256, 1024]


@dataclass(frozen=True)
class Estimator:
    """How the examples of a batch are perturbed."""

    name: str
    base_perturbations: int | None
    """None: one for each example."""
    arguments: Mapping[str, Any]
    most: int = 2**30
    """Largest batch that is worth the time."""
    networks: tuple[str, ...] = ("MLP", "CNN", "LSTM")


ESTIMATORS = [
    Estimator("shared", 1, {"estimator": "shared"}),
    Estimator("flipout", 1, {}),
    Estimator("flipout, 8 base perturbations", 8, {}),
    Estimator(
        "local reparameterization",
        1,
        {"estimator": "local_reparameterization"},
        networks=("MLP",),
    ),
    Estimator("independent", None, {}, most=256),
]


def mlp(**arguments: Any) -> nn.Module:
    """784-100-10, ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        FlipoutLinear(784, 100, **arguments),
        nn.ReLU(),
        FlipoutLinear(100, 10, **arguments),
    )


def cnn(**arguments: Any) -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        FlipoutConv2d(1, 8, 5, stride=2, **arguments),
        nn.ReLU(),
        FlipoutConv2d(8, 16, 5, stride=2, **arguments),
        nn.ReLU(),
        nn.Flatten(),
        FlipoutLinear(256, 10, **arguments),
    )


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.rnn = FlipoutLSTM(28, 32, batch_first=True, **arguments)
        self.read_out = FlipoutLinear(32, 10, **arguments)

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.rnn(images.squeeze(1))
        logits: Tensor = self.read_out(output[:, -1])
        return logits


NETWORKS: dict[str, Callable[..., nn.Module]] = {"MLP": mlp, "CNN": cnn, "LSTM": Recurrent}


def measure_variance(
    images: Tensor, labels: Tensor, repeats: int, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """A row per network and estimator: variances of gradients by mean and by rho.

    Args:
        images: float32, shape (count, 1, 28, 28).
        labels: int64, shape (count,).
        repeats: gradients from which a variance is estimated.
        batches: numbers of examples.
    """
    rows = []
    for network, build in NETWORKS.items():
        for estimator in ESTIMATORS:
            if network not in estimator.networks:
                continue
            curve = []
            for batch in batches:
                if batch > estimator.most // (4 if network == "LSTM" else 1):
                    continue
                torch.manual_seed(0)
                model = build(
                    perturbation=PERTURBATION,
                    base_perturbations=estimator.base_perturbations or batch,
                    **estimator.arguments,
                )
                curve.append((batch, *gradient_variance(model, images, labels, batch, repeats)))
            rows.append(_row(network, estimator.name, curve))
    return rows


def gradient_variance(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int, repeats: int
) -> tuple[float, float]:
    """Variance of a component of the gradient by mean and by rho, averaged over components."""
    layers = [layer for layer in model.modules() if isinstance(layer, PerturbedLayer)]
    weights = [weight for layer in layers for weight in layer.perturbed_weights()]
    groups = [[w.mean for w in weights], [w.spread[0] for w in weights]]
    sums = [[torch.zeros(p.shape, dtype=torch.float64) for p in group] for group in groups]
    squares = [[torch.zeros_like(total) for total in group] for group in sums]
    for _ in range(repeats):
        chosen = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        grads = iter(torch.autograd.grad(loss, [p for group in groups for p in group]))
        for totals, square in zip(sums, squares, strict=True):
            for index in range(len(totals)):
                grad = next(grads).double()
                totals[index] += grad
                square[index] += grad.square()
    found = []
    for totals, square in zip(sums, squares, strict=True):
        variances = [
            (sq - total.square() / repeats).sum() / (repeats - 1)
            for total, sq in zip(totals, square, strict=True)
        ]
        found.append(float(sum(variances)) / sum(total.numel() for total in totals))
    return found[0], found[1]


def _row(network: str, estimator: str, curve: list[tuple[int, float, float]]) -> dict[str, Any]:
    batches = [point[0] for point in curve]
    return {
        "network": network,
        "estimator": estimator,
        "batch": batches,
        "variance_by_mean": [point[1] for point in curve],
        "variance_by_rho": [point[2] for point in curve],
        "slope_by_mean": slope(batches, [point[1] for point in curve]),
        "slope_by_rho": slope(batches, [point[2] for point in curve]),
    }


def slope(batches: Sequence[int], variances: Sequence[float]) -> float:
    """Least-squares slope of log variance against log batch size."""
    x = torch.tensor([math.log(batch) for batch in batches], dtype=torch.float64)
    y = torch.tensor([math.log(variance) for variance in variances], dtype=torch.float64)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Variance against batch size, a panel per network and kind of parameter."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, len(NETWORKS), sharex=True)
    names = [estimator.name for estimator in ESTIMATORS]
    for column, network in enumerate(NETWORKS):
        for line, kind in enumerate(("mean", "rho")):
            axes = panels[line][column]
            for row in rows:
                if row["network"] == network:
                    color = f"C{names.index(row['estimator'])}"
                    curve = row[f"variance_by_{kind}"]
                    axes.loglog(row["batch"], curve, "o-", color=color, label=row["estimator"])
            axes.set_title(f"{network}, gradient by {kind}")
            if line:
                axes.set_xlabel("examples per batch")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize="small")
    figure.supylabel("variance of a component")
    return figure


def table(rows: list[dict[str, Any]]) -> Table:
    """The slopes for people."""
    shown = Table("network", "estimator", "batches", "slope by mean", "slope by rho")
    for row in rows:
        shown.add_row(
            row["network"],
            row["estimator"],
            f"{row['batch'][0]} to {row['batch'][-1]}",
            f"{row['slope_by_mean']:.3f}",
            f"{row['slope_by_rho']:.3f}",
        )
    return shown
