"""Throughput of evolution strategies: flipout, independent copies, one at a time, EvoTorch.

What is timed is a generation: perturbations of all members of a 784-100-10 network with biases,
their losses on some examples each, and the estimate of the gradient from their ranks. Each method
has the best of some population sizes, since copies are fastest while they fit into a cache.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks import measure
from lightning_revflip.flipout import FlipoutES, shape_fitness

SIGMA = 0.05
EXAMPLES = [1, 16]
POPULATIONS = {
    "flipout": [1024, 8192],
    "independent copies (bmm)": [64, 256],
    "one at a time": [64],
    "EvoTorch PGPE (vmap)": [64, 256],
}

Generation = Callable[[], object]


def network() -> nn.Sequential:
    """784-100-10, ReLU."""
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def flipout(population: int, examples: int) -> Generation:
    """All members as rows of one batch."""
    model, (x, y) = network(), data(population * examples)
    es = FlipoutES(model, SIGMA, population, seed=0)

    def generation() -> None:
        with es.members():
            losses = F.cross_entropy(model(x), y, reduction="none")
        es.gradient(es.fitness_of_losses(losses))
        es.next_generation()

    return generation


def copies(population: int, examples: int) -> Generation:
    """A copy of the parameters for each member, batched matrix products, antithetic pairs."""
    model, (x, y) = network(), data(population * examples)
    parameters = list(model.parameters())
    x = x.view(population, examples, -1)

    @torch.no_grad()
    def generation() -> None:
        noise = [torch.randn(population // 2, *p.shape) for p in parameters]
        w1, b1, w2, b2 = (
            torch.cat([p + SIGMA * e, p - SIGMA * e])
            for p, e in zip(parameters, noise, strict=True)
        )
        hidden = torch.baddbmm(b1.unsqueeze(1), x, w1.mT).relu()
        logits = torch.baddbmm(b2.unsqueeze(1), hidden, w2.mT)
        losses = F.cross_entropy(logits.flatten(0, 1), y, reduction="none")
        _set_gradients(parameters, noise, -losses.view(population, -1).mean(1))

    return generation


def one_at_a_time(population: int, examples: int) -> Generation:
    """One member after the other, its noise kept until the estimate."""
    model, (x, y) = network(), data(population * examples)
    parameters = list(model.parameters())
    batches = list(zip(x.split(examples), y.split(examples), strict=True))

    @torch.no_grad()
    def generation() -> None:
        noise = [torch.randn(population // 2, *p.shape) for p in parameters]
        fitness = []
        for member, (inputs, labels) in enumerate(batches):
            sign, pair = (1, member) if member < population // 2 else (-1, member - population // 2)
            w1, b1, w2, b2 = (
                torch.add(p, e[pair], alpha=sign * SIGMA)
                for p, e in zip(parameters, noise, strict=True)
            )
            logits = F.linear(F.linear(inputs, w1, b1).relu(), w2, b2)
            fitness.append(-F.cross_entropy(logits, labels))
        _set_gradients(parameters, noise, torch.stack(fitness))

    return generation


def evotorch(population: int, examples: int) -> Generation:
    """EvoTorch's PGPE, whose problem evaluates the members by vmap."""
    from evotorch import Problem
    from evotorch.algorithms import PGPE
    from evotorch.decorators import vectorized

    logging.getLogger("evotorch").setLevel(logging.WARNING)
    model, (x, y) = network(), data(population * examples)
    x, y = x.view(population, examples, -1), y.view(population, examples)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(vector: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        parameters = {n: v.view(shapes[n]) for n, v in zip(shapes, parts, strict=True)}
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)

    @vectorized
    def losses(members: Tensor) -> Tensor:
        return vmap(loss)(members, x, y)

    problem = Problem(
        "min",
        losses,
        solution_length=sum(shape.numel() for shape in shapes.values()),
        initial_bounds=(-SIGMA, SIGMA),
    )
    searcher = PGPE(
        problem,
        popsize=population,
        center_learning_rate=0.01,
        stdev_learning_rate=0.1,
        stdev_init=SIGMA,
    )
    step: Generation = searcher.step
    return step


METHODS: dict[str, Callable[[int, int], Generation]] = {
    "flipout": flipout,
    "independent copies (bmm)": copies,
    "one at a time": one_at_a_time,
    "EvoTorch PGPE (vmap)": evotorch,
}


def measure_evolution(budget: float) -> list[dict[str, Any]]:
    """A row per method and number of examples, with its best population."""
    rows = []
    for examples in EXAMPLES:
        torch.manual_seed(0)
        runs = {
            (method, population): METHODS[method](population, examples)
            for method in METHODS
            if method != "EvoTorch PGPE (vmap)" or importlib.util.find_spec("evotorch")
            for population in POPULATIONS[method]
        }
        named = {f"{method}/{population}": run for (method, population), run in runs.items()}
        times = measure.seconds(named, budget, 5)
        best: dict[str, dict[str, Any]] = {}
        for method, population in runs:
            seconds = measure.summary(times[f"{method}/{population}"])
            rate = population / seconds["median"]
            if method not in best or rate > best[method]["members_per_second"]:
                best[method] = {
                    "method": method,
                    "examples": examples,
                    "population": population,
                    "seconds": seconds,
                    "members_per_second": rate,
                }
        for row in best.values():
            fastest = best["flipout"]["members_per_second"]
            row["flipout_ratio"] = fastest / row["members_per_second"]
            rows.append(row)
    return rows


def data(count: int) -> tuple[Tensor, Tensor]:
    """Random inputs and labels; their values do not matter for the time."""
    return torch.rand(count, 784), torch.randint(10, (count,))


def _set_gradients(parameters: list[nn.Parameter], noise: list[Tensor], fitness: Tensor) -> None:
    """The estimate of antithetic pairs from the noise that was kept."""
    forwards, backwards = shape_fitness(fitness, "rank").chunk(2)
    weights = (forwards - backwards) / (-len(fitness) * SIGMA)
    for parameter, e in zip(parameters, noise, strict=True):
        parameter.grad = (weights @ e.flatten(1)).view_as(parameter)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table("examples", "method", "population", "members/s", "flipout is")
    for row in rows:
        shown.add_row(
            str(row["examples"]),
            row["method"],
            str(row["population"]),
            f"{row['members_per_second']:,.0f}",
            f"{row['flipout_ratio']:.1f}x",
        )
    return shown
