"""Predictions of 100 samples: `predict`, and a loop that loads one `state_dict` after the other."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.sgld_steps import network
from lightning_revflip.posterior import predict

SAMPLES = 100
BATCHES = (1, 10, 100, 1000)


def measure_prediction(budget: float) -> list[dict[str, Any]]:
    """Time of both at several batch sizes; the samples lie in memory as each wants them."""
    model = network().eval()
    states = [_jittered(model, seed) for seed in range(SAMPLES)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    rows = []
    for size in BATCHES:
        images = torch.rand(size, 1, 28, 28)
        runs = {
            "loop": lambda images=images: _loop(model, states, images),
            "predict": lambda images=images: predict(model, stacked, images),
        }
        torch.testing.assert_close(runs["loop"](), runs["predict"]())
        times = measure.seconds(runs, budget / len(BATCHES))
        found = {name: measure.summary(taken) for name, taken in times.items()}
        speedup = found["loop"]["median"] / found["predict"]["median"]
        rows.append({"batch": size, **found, "speedup": speedup})
    return rows


def _jittered(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: each + 0.01 * torch.randn(each.shape, generator=generator)
        for name, each in model.state_dict().items()
    }


@torch.no_grad()
def _loop(model: nn.Module, states: list[dict[str, Tensor]], images: Tensor) -> Tensor:
    predictions = []
    for state in states:
        model.load_state_dict(state)
        predictions.append(model(images).softmax(-1))
    return torch.stack(predictions)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people, times in milliseconds."""
    shown = Table("batch", "loop, ms", "predict, ms", "times faster")
    for row in rows:
        times = [f"{row[name]['median'] * 1e3:.2f}" for name in ("loop", "predict")]
        shown.add_row(str(row["batch"]), *times, f"{row['speedup']:.2f}")
    return shown
