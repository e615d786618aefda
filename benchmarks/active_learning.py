"""Active learning on MNIST: accuracy over the number of labels, 784-100-10, 20 to 500 labels.

    python -m benchmarks.active_learning [--runs sgld-random sgld-bald ...] [--seeds 0 1 2]

Two labels of each class at first, ten more in each of 48 rounds, picked from 2,000 unlabelled
images; each round trains a new network. Accuracies are those after the last step of training, on
the test; nothing is chosen by them. Prior, temperature and steps were chosen on 1,000 images of the
validation set. Runs are written to a folder, and go on from there when the command is repeated.
Needs MNIST in REVFLIP_DATA; writes results/active_learning.json and
recipes/mnist/active_learning.png.

The same algorithm as `recipes.mnist.active_learning`, with a plain loop instead of a Trainer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import measure
from lightning_revflip.apd import distil
from lightning_revflip.applications import (
    ActiveLearning,
    DropoutPredictor,
    NetworkPredictor,
    Pool,
    PosteriorPredictor,
)
from lightning_revflip.applications.active_learning import Predictive, Round
from lightning_revflip.posterior import Layout, predict
from lightning_revflip.sgld import SGLD
from recipes.mnist.active_learning import accuracy_figure
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.networks import mlp

ROUNDS = 49  # trained on 20, 30, ..., 500 labels
EVALUATE_EVERY = 4  # at 20, 60, ..., 500 labels
STEPS, BURN_IN, EVERY, SAMPLES = 450, 250, 8, 25
BATCH, LR, TEMPERATURE, PRIOR_PRECISION = 32, 1.0, 0.001, 1.0
RANK, DISTILLATION_STEPS = 15, 150
DROPOUT = 0.5
RUNS = {
    f"{posterior}-{acquisition}": (posterior, acquisition)
    for posterior, acquisitions in {
        "sgld": ("random", "entropy", "bald", "variation_ratio"),
        "apd": ("random", "bald", "variation_ratio"),
        "network": ("random", "entropy"),
        "dropout": ("random", "bald"),
    }.items()
    for acquisition in acquisitions
}
TARGETS = (0.80, 0.85, 0.90, 0.93)


@dataclass
class Samples:
    """Samples of weights in memory."""

    layout: Layout
    rows: Tensor

    def chunks(self, size: int) -> Iterator[Tensor]:
        yield from torch.split(self.rows, size)


def train(posterior: str, images: Tensor, labels: Tensor, seed: int) -> Predictive:
    """Train a new network, and return what it, or samples of it, predict."""
    torch.manual_seed(seed)
    network = mlp(images[0].numel(), [100], 10, DROPOUT if posterior == "dropout" else 0.0)
    sampled = posterior in ("sgld", "apd")
    optimizer = SGLD(
        network.parameters(),
        LR,
        num_data=len(images),
        temperature=TEMPERATURE if sampled else 0.0,
        prior_precision=PRIOR_PRECISION,
    )
    layout = Layout.of_parameters(network)
    rows = torch.empty(SAMPLES, layout.numel)
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
        after = step - BURN_IN
        if after > 0 and after % EVERY == 0:
            layout.flatten(dict(network.named_parameters()), out=rows[after // EVERY - 1])
    if posterior == "network":
        return NetworkPredictor(network)
    if posterior == "dropout":
        return DropoutPredictor(network, SAMPLES)
    if posterior == "apd":
        distilled = distil(Samples(layout, rows), RANK, steps=DISTILLATION_STEPS, seed=seed)
        random = torch.Generator().manual_seed(seed)
        return PosteriorPredictor(distilled, network, SAMPLES, generator=random)
    samples = layout.unflatten(rows)
    return lambda images: predict(network, samples, images)


def run(name: str, seed: int, folder: Path, rounds: int) -> list[Round]:
    """One curve; goes on with one that was begun."""
    torch.set_num_threads(1)
    posterior, acquisition = RUNS[name]
    data = HandwrittenDigits(source="mnist")
    for stage in ("fit", "test"):
        data.setup(stage)
    pool, test = data.train_dataloader(), data.test_dataloader()
    learning = ActiveLearning(
        functools.partial(train, posterior),
        pool.images,
        pool.labels,
        Pool.balanced(pool.labels, 2, torch.Generator().manual_seed(seed)),
        acquisition=acquisition,
        labels_per_round=10,
        num_candidates=2000,
        evaluate={"test": (test.images, test.labels)},
        evaluate_every=EVALUATE_EVERY,
        seed=seed,
        path=folder / f"{name}-{seed}.json",
    )
    return learning.run(rounds)


def labels_needed(rounds: list[Round], target: float) -> int | None:
    """The number of labels from which on the accuracy stays at a target or above."""
    needed = None
    for each in reversed([each for each in rounds if each.accuracy]):
        if each.accuracy["test"] < target:
            break
        needed = each.num_labelled
    return needed


def table(rows: list[dict[str, Any]]) -> Table:
    """Means and standard deviations over the seeds."""
    marks = (100, 220, 300, 420, 500)
    shown = Table("run", *(f"{mark} labels" for mark in marks), *(f"to {t:.0%}" for t in TARGETS))
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        cells = []
        for mark in marks:
            values = [
                row["accuracy"][row["labels"].index(mark)] for row in own if mark in row["labels"]
            ]
            spread = f" ± {statistics.stdev(values):.2%}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2%}{spread}" if values else "")
        for target in TARGETS:
            needed = [row["labels_needed"][f"{target:.2f}"] for row in own]
            cells.append("/".join("-" if each is None else str(each) for each in needed))
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/active_learning"))
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    asked = [(name, seed) for seed in options.seeds for name in options.runs]
    with ProcessPoolExecutor(options.workers) as workers:
        found = [
            workers.submit(run, name, seed, options.folder, options.rounds) for name, seed in asked
        ]
        curves = {each: future.result() for each, future in zip(asked, found, strict=True)}
    rows = [
        {
            "run": name,
            "seed": seed,
            "labels": [each.num_labelled for each in rounds if each.accuracy],
            "accuracy": [each.accuracy["test"] for each in rounds if each.accuracy],
            "labels_needed": {f"{t:.2f}": labels_needed(rounds, t) for t in TARGETS},
        }
        for (name, seed), rounds in curves.items()
    ]
    Console(width=200).print(table(rows))
    settings = {
        "steps": STEPS,
        "burn_in": BURN_IN,
        "samples": SAMPLES,
        "batch_size": BATCH,
        "lr": LR,
        "temperature": TEMPERATURE,
        "prior_precision": PRIOR_PRECISION,
        "rank": RANK,
        "distillation_steps": DISTILLATION_STEPS,
        "dropout": DROPOUT,
    }
    print(measure.write("active_learning", rows, device="cpu", settings=settings))
    figure = accuracy_figure(
        {name: [curves[name, seed] for seed in options.seeds] for name in options.runs}
    )
    figure.savefig("recipes/mnist/active_learning.png", dpi=100)


if __name__ == "__main__":
    main()
