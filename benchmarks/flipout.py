"""Flipout: cost of layers, variance of gradients, large batches, evolution strategies.

    python -m benchmarks.flipout [layers variance large_batch evolution] [--quick]

One thread. bayesian-torch and EvoTorch are measured beside where they are installed; variance and
large batches need MNIST in REVFLIP_DATA. Each part writes results/flipout_PART.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import (
    flipout_evolution,
    flipout_large_batch,
    flipout_layers,
    flipout_variance,
    measure,
)
from recipes.mnist.images import find_images

CONSOLE = Console()


def layers(quick: bool) -> None:
    """What a layer costs."""
    rows = flipout_layers.measure_layers(2.0 if quick else 30.0)
    CONSOLE.print(flipout_layers.table(rows))
    if not quick:
        CONSOLE.print(f"written to {measure.write('flipout_layers', rows)}")


def variance(quick: bool) -> None:
    """Variance of gradients against batch size."""
    batches = flipout_variance.BATCHES[:3] if quick else flipout_variance.BATCHES
    rows = flipout_variance.measure_variance(*mnist(10_000), 4 if quick else 100, batches)
    CONSOLE.print(flipout_variance.table(rows))
    if not quick:
        flipout_variance.draw(rows).savefig("docs/flipout_variance.png", dpi=90)
        std = flipout_variance.STD
        CONSOLE.print(f"written to {measure.write('flipout_variance', rows, std=std)}")


def large_batch(quick: bool) -> None:
    """Iterations to a training loss."""
    batches = flipout_large_batch.BATCHES[:1] if quick else flipout_large_batch.BATCHES
    rows = flipout_large_batch.measure_large_batches(*mnist(50_000), 1 if quick else 3, batches)
    CONSOLE.print(flipout_large_batch.table(rows))
    if not quick:
        target, std = flipout_large_batch.TARGET, flipout_large_batch.STD
        path = measure.write("flipout_large_batch", rows, target=target, std=std)
        CONSOLE.print(f"written to {path}")


def evolution(quick: bool) -> None:
    """Members of evolution strategies per second."""
    rows = flipout_evolution.measure_evolution(2.0 if quick else 30.0)
    CONSOLE.print(flipout_evolution.table(rows))
    if not quick:
        CONSOLE.print(f"written to {measure.write('flipout_evolution', rows)}")


PARTS: dict[str, Callable[[bool], None]] = {
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--quick", action="store_true", help="a glance, no results file")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        PARTS[part](options.quick)


if __name__ == "__main__":
    main()
