"""How well the chains of a bank mix, in weight space and in function space."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_revflip.posterior import Parameters, SampleBank
from lightning_revflip.sgld.diagnostics import FEWEST_DRAWS, Diagnostics, diagnose, probe_weights

Outputs = Callable[[Parameters], Tensor]
"""Outputs of a network for some examples, (samples, ...), of samples of its weights."""

_MOST_DRAWS = 500
"""Draws of each chain; more of the same span of time tell little."""
_QUANTITIES = 32
_CHUNK = 50
_LARGEST = 1e30


class Mixing(NamedTuple):
    """Diagnostics of the same draws, in two spaces.

    Attributes:
        weights: over some weights and projections of all weights.
        function: over some outputs of the network.
    """

    weights: Diagnostics
    function: Diagnostics

    def metrics(self) -> dict[str, float]:
        """Numbers to log: the smallest ESS and the largest R-hat of each space."""
        return {
            "ess_weights": self.weights.ess_min,
            "rhat_weights": self.weights.rhat_max,
            "ess_function": self.function.ess_min,
            "rhat_function": self.function.rhat_max,
        }

    def __str__(self) -> str:
        return f"In weight space: {self.weights}\nIn function space: {self.function}"


def measure(bank: SampleBank, outputs: Outputs) -> Mixing | None:
    """Diagnose the chains of a bank in both spaces; None if one has too few draws."""
    weights = measure_weights(bank)
    if weights is None:
        return None

    def function(indices: list[int]) -> Tensor:
        samples = {**bank.layout.unflatten(bank.rows(indices)), **bank.buffers(indices)}
        return _columns(outputs(samples).flatten(1).double().cpu())

    return Mixing(weights, diagnose(_of_draws(_draws(bank), function)))


def report(bank: SampleBank, outputs: Outputs | None) -> Mixing | Diagnostics | None:
    """Diagnose what can be: function space as well if outputs are known."""
    return measure_weights(bank) if outputs is None else measure(bank, outputs)


def measure_weights(bank: SampleBank) -> Diagnostics | None:
    """Diagnose the chains of a bank in weight space; None if one has too few draws."""
    draws = _draws(bank)
    if draws.shape[1] < FEWEST_DRAWS:
        return None
    return diagnose(_of_draws(draws, lambda indices: probe_weights(bank.rows(indices))))


def _draws(bank: SampleBank) -> Tensor:
    """Numbers of samples, (chains, draws): of each chain as many as the shortest has."""
    lengths = [len(steps) for steps in bank.steps.values()]
    count = min(*lengths, _MOST_DRAWS)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    spread = [torch.linspace(0, length - 1, count).round().long() for length in lengths]
    return torch.stack([start + each for start, each in zip(starts, spread, strict=False)])


def _of_draws(draws: Tensor, quantities: Callable[[list[int]], Tensor]) -> Tensor:
    """Quantities of samples, (samples, quantities), in the shape (chains, draws, quantities)."""
    indices = draws.flatten().tolist()
    parts = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    found = torch.cat([quantities(part) for part in parts])
    return found.view(*draws.shape, -1)


def _columns(values: Tensor) -> Tensor:
    """Some of the columns, at equal distances; those of masked outputs become constant."""
    count = min(_QUANTITIES, values.shape[1])
    chosen = values[:, torch.linspace(0, values.shape[1] - 1, count).round().long()]
    return chosen.nan_to_num(nan=0.0).clamp(-_LARGEST, _LARGEST)
