"""Large batches under multiplicative Gaussian noise: iterations to a training loss.

With one perturbation for a batch, its noise in the gradient does not fall with the size of the
batch; with flipout it does (Wen et al., 2018, section 5.3). A network of 784-200-200-10 units, each
weight times N(1, 1), is trained by Adam until the noisy loss of 2,000 training images is reached;
each candidate has the best of some learning rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from lightning_revflip.flipout import FlipoutLinear, MultiplicativeGaussian, sampling
from lightning_revflip.flipout.layer import Estimator

BATCHES = [128, 512, 2048, 8192]
RATES = [1e-3, 3e-3, 1e-2]
STD = 1.0
TARGET = 0.3
CHECK_EVERY = 5
"""Iterations between two looks at the loss."""
MAX_ITERATIONS = 500


def measure_large_batches(
    images: Tensor, labels: Tensor, seeds: int, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """A row per batch size and estimator, with the best of `RATES`.

    Args:
        images: float32, shape (count, 1, 28, 28).
        labels: int64, shape (count,).
        seeds: repetitions, averaged.
        batches: numbers of examples.
    """
    rows = []
    for batch in batches:
        for estimator in ("flipout", "shared"):
            counts = {
                rate: [
                    iterations(images, labels, estimator, batch, rate, seed)
                    for seed in range(seeds)
                ]
                for rate in RATES
            }
            best = min(counts, key=lambda rate: statistics.fmean(counts[rate]))
            rows.append(
                {
                    "batch": batch,
                    "estimator": estimator,
                    "lr": best,
                    "iterations": counts[best],
                    "mean_iterations": statistics.fmean(counts[best]),
                    "reached": max(counts[best]) < MAX_ITERATIONS,
                }
            )
    return rows


def iterations(
    images: Tensor, labels: Tensor, estimator: Estimator, batch: int, rate: float, seed: int
) -> int:
    """Iterations until the loss is reached; `MAX_ITERATIONS` if it is not."""
    torch.manual_seed(seed)
    sizes = (784, 200, 200, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        noise = MultiplicativeGaussian(STD)
        layers += [
            FlipoutLinear(inputs, outputs, perturbation=noise, estimator=estimator),
            nn.ReLU(),
        ]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for iteration in range(1, MAX_ITERATIONS + 1):
        chosen = torch.randint(len(images), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if iteration % CHECK_EVERY == 0 and training_loss(network, images, labels) <= TARGET:
            return iteration
    return MAX_ITERATIONS


@torch.no_grad()
def training_loss(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The loss under independent noise, alike for both estimators."""
    with sampling(network, "flipout"):
        return float(F.cross_entropy(network(images[:2000]), labels[:2000]))


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table("batch", "flipout", "shared", "shared / flipout")
    for flipout, shared in zip(rows[::2], rows[1::2], strict=True):
        ratio = shared["mean_iterations"] / flipout["mean_iterations"]
        counts = [
            f"{'' if row['reached'] else 'over '}{row['mean_iterations']:.0f} (lr {row['lr']})"
            for row in (flipout, shared)
        ]
        shown.add_row(str(flipout["batch"]), *counts, f"{ratio:.2f}")
    return shown
