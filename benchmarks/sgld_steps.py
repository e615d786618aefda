"""Steps per second of the samplers beside optimizers, and what collecting samples adds."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks import measure
from lightning_revflip.posterior import ChainWriter, Layout
from lightning_revflip.sgld import PSGLD, SGHMC, SGLD

NUM_DATA = 50_000
LR = 0.05
PRIOR = 50.0
EVERY = 20
"""Steps between samples."""


def network() -> nn.Sequential:
    """784-100-10, the network of the paper: 79,510 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def batch() -> tuple[Tensor, Tensor]:
    """100 images of noise, which cost what real ones do."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 1, 28, 28, generator=generator)
    return images, torch.randint(10, (100,), generator=generator)


def training(
    make: Callable[[Any], Optimizer], collect: Callable[[nn.Module, int], None] | None = None
) -> Callable[[], None]:
    """Trains for `EVERY` steps, and collects the weights thereafter."""
    model, (images, labels) = network(), batch()
    optimizer = make(model.parameters())
    steps = 0

    def run() -> None:
        nonlocal steps
        for _ in range(EVERY):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        steps += EVERY
        if collect is not None:
            collect(model, steps)

    return run


def sampler(kind: type[Any], lr: float = LR, **options: Any) -> Callable[[Any], Optimizer]:
    """Makes a sampler of the paper's posterior."""
    return lambda params: kind(params, lr, num_data=NUM_DATA, prior_precision=PRIOR, **options)


# --- optimizers ----------------------------------------------------------------------------------


def measure_steps(budget: float) -> list[dict[str, Any]]:
    """Time of a step, beside SGD."""
    runs = {
        "torch SGD": training(lambda params: SGD(params, LR)),
        "torch SGD, weight decay": training(lambda params: SGD(params, LR, weight_decay=1e-3)),
        "torch Adam": training(Adam),
        "SGLD": training(sampler(SGLD)),
        "PSGLD": training(sampler(PSGLD, 1e-3)),
        "SGHMC": training(sampler(SGHMC)),
        "SGLD, torch's operations": _uncompiled(training(sampler(SGLD))),
        "SGLD, torch's operations, flat": _uncompiled(training(sampler(SGLD, flat=True))),
        **dict(_rivals()),
    }
    times = measure.seconds(runs, budget)
    sgd = measure.summary(times["torch SGD"])["median"]
    return [
        {
            "optimizer": name,
            **(found := {key: value / EVERY for key, value in measure.summary(taken).items()}),
            "rounds": len(taken),
            "of_sgd": sgd / EVERY / found["median"],
        }
        for name, taken in times.items()
    ]


def _uncompiled(run: Callable[[], None]) -> Callable[[], None]:
    from lightning_revflip.sgld import native

    def uncompiled() -> None:
        takes, native.takes = native.takes, lambda *_: False
        try:
            run()
        finally:
            native.takes = takes

    return uncompiled


def _rivals() -> Iterator[tuple[str, Callable[[], None]]]:
    if (rival := _torch_uncertainty_sgld()) is not None:
        noise = (1 / NUM_DATA) ** 0.5  # by hand, so that it samples from the posterior
        make = lambda params: rival(params, LR / 2, noise, PRIOR / NUM_DATA)  # noqa: E731
        yield "torch-uncertainty SGLD", training(make)
    if importlib.util.find_spec("posteriors") is not None:
        yield "posteriors sgld", _posteriors()


def _torch_uncertainty_sgld() -> Any:
    """Its class, from the file alone: the package imports much that is not needed here."""
    found = importlib.util.find_spec("torch_uncertainty")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "optim" / "sgld.py"
    spec = importlib.util.spec_from_file_location("torch_uncertainty_sgld", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SGLD


def _posteriors() -> Callable[[], None]:
    import posteriors

    model, data = network(), batch()

    def log_posterior(params: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = torch.func.functional_call(model, params, images)
        squares = sum(each.square().sum() for each in params.values())
        return -F.cross_entropy(logits, labels) - PRIOR / 2 / NUM_DATA * squares, torch.zeros(())

    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=LR / 2, temperature=1 / NUM_DATA)
    state = transform.init({name: each.detach() for name, each in model.named_parameters()})

    def run() -> None:
        nonlocal state
        for _ in range(EVERY):
            state, _ = transform.update(state, data, inplace=True)

    return run


# --- collection ----------------------------------------------------------------------------------


def measure_collection(budget: float, least: int = 100) -> list[dict[str, Any]]:
    """What it adds to `EVERY` steps of SGLD to keep the weights thereafter.

    Collecting is timed by itself, since it is less than the steps vary, for at least `least`
    samples, since some that fill a shard cost more than the others.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept: list[Any] = []
        collectors: dict[str, Callable[[nn.Module, int], None]] = {
            f"bank, {dtype}, {policy}": _writer(stack, folder, dtype, policy)
            for dtype in ("float16", "float32")
            for policy in ("spread", "latest")
        }
        collectors["deepcopy of a state_dict"] = lambda model, _: kept.append(
            copy.deepcopy(model.state_dict())
        )
        collectors["torch.save of a state_dict"] = lambda model, step: torch.save(
            model.state_dict(), folder / f"{step}.pt"
        )
        times = _time_apart(collectors, budget, least)
    steps = measure.summary(measure.seconds({"": training(sampler(SGLD))}, budget / 4)[""])
    return [
        {
            "collector": name,
            "samples": len(taken),
            "mean": (mean := sum(taken) / len(taken)),
            "of_steps": mean / steps["median"],
        }
        for name, taken in times.items()
    ]


def _writer(
    stack: ExitStack, folder: Path, dtype: str, policy: Any
) -> Callable[[nn.Module, int], None]:
    writer = stack.enter_context(
        ChainWriter(
            folder / f"{dtype}-{policy}",
            Layout.of_parameters(network()),
            max_samples=100,
            policy=policy,
            dtype=getattr(torch, dtype),
        )
    )
    named: dict[str, Tensor] = {}

    def collect(model: nn.Module, step: int) -> None:
        if not named:  # once, as the callback does
            named.update(model.named_parameters())
        writer.append(step, named)

    return collect


def _time_apart(
    collectors: dict[str, Callable[[nn.Module, int], None]], budget: float, least: int
) -> dict[str, list[float]]:
    """Time of each collector alone, in the course of a training."""
    times: dict[str, list[float]] = {name: [] for name in collectors}

    def timed(name: str) -> Callable[[nn.Module, int], None]:
        def collect(model: nn.Module, step: int) -> None:
            begin = time.perf_counter()
            collectors[name](model, step)
            times[name].append(time.perf_counter() - begin)

        return collect

    runs = {name: training(sampler(SGLD), timed(name)) for name in collectors}
    measure.seconds(runs, budget, least)
    return times


def table(rows: list[dict[str, Any]], *, first: str, ratio: str, time: str) -> Table:
    """The rows for people, times in microseconds."""
    shown = Table(first, "µs", ratio)
    for row in rows:
        shown.add_row(row[first], f"{row[time] * 1e6:.0f}", f"{row[ratio]:.3f}")
    return shown
