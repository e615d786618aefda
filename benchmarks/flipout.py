"""Flipout: cost of layers, variance of gradients, large batches, evolution strategies.

    python -m benchmarks.flipout [layers variance large_batch evolution] [--quick]

One thread. bayesian-torch and EvoTorch are measured beside where they are installed; variance and
large batches need MNIST in REVFLIP_DATA. Each part writes results/flipout_PART.json.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import (
    flipout_evolution,
    flipout_large_batch,
    flipout_layers,
    flipout_variance,
    measure,
)
from benchmarks.measure import Part
from recipes.mnist.images import find_images


def layers(quick: bool) -> Part:
    """What a layer costs."""
    rows = flipout_layers.measure_layers(2.0 if quick else 30.0)
    return Part(rows, flipout_layers.table(rows))


def variance(quick: bool) -> Part:
    """Variance of gradients against batch size."""
    batches = flipout_variance.BATCHES[:3] if quick else flipout_variance.BATCHES
    rows = flipout_variance.measure_variance(*mnist(10_000), 4 if quick else 100, batches)
    return Part(rows, flipout_variance.table(rows), {"std": flipout_variance.STD})


def large_batch(quick: bool) -> Part:
    """Iterations to a training loss."""
    batches = flipout_large_batch.BATCHES[:1] if quick else flipout_large_batch.BATCHES
    rows = flipout_large_batch.measure_large_batches(*mnist(50_000), 1 if quick else 3, batches)
    settings = {"target": flipout_large_batch.TARGET, "std": flipout_large_batch.STD}
    return Part(rows, flipout_large_batch.table(rows), settings)


def evolution(quick: bool) -> Part:
    """Members of evolution strategies per second."""
    rows = flipout_evolution.measure_evolution(2.0 if quick else 30.0)
    return Part(rows, flipout_evolution.table(rows))


PARTS: dict[str, Callable[[bool], Part]] = {
    "layers": layers,
    "variance": variance,
    "large_batch": large_batch,
    "evolution": evolution,
}


def mnist(count: int) -> tuple[Tensor, Tensor]:
    """The first training images of MNIST, float32 from 0 to 1, and their labels."""
    found = find_images("mnist", None)
    return found.pixels[:count].float() / found.white, found.labels[:count]


def main() -> None:
    measure.run_parts("flipout", PARTS, __doc__)


if __name__ == "__main__":
    main()
