"""Figures of a handful of quantities: how chains moved, and how long they remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_revflip.sgld.diagnostics import autocorrelation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_QUANTITIES = 12


def trace_figure(
    draws: Tensor, names: Sequence[str] | None = None, steps: Sequence[int] | None = None
) -> Figure:
    """Each quantity over time, one line for each chain. Needs matplotlib.

    Lines of chains that mix lie on each other and look like noise without drift.

    Args:
        draws: shape (chains, draws) or (chains, draws, quantities), at most 12 quantities.
        names: of the quantities; None: their numbers.
        steps: training step of each draw; None: draws are numbered.

    Raises:
        ValueError: for another shape, more quantities, or as many names or steps as do not fit.
    """
    chains = _few_quantities(draws)
    if steps is not None and len(steps) != chains.shape[1]:
        raise ValueError(f"Expected a step for each of {chains.shape[1]} draws, got {len(steps)}.")
    places = range(chains.shape[1]) if steps is None else steps
    figure, rows = _rows(chains.shape[2], names)
    for axes, values in zip(rows, chains.unbind(2), strict=True):
        for number, chain in enumerate(values):
            axes.plot(places, chain.numpy(), linewidth=0.8, label=f"chain {number}")
    rows[-1].set_xlabel("draw" if steps is None else "step")
    if len(chains) > 1:
        rows[0].legend(loc="upper right", fontsize="small")
    return figure


def autocorrelation_figure(
    draws: Tensor, names: Sequence[str] | None = None, max_lag: int = 100
) -> Figure:
    """Autocorrelation of each quantity by lag, one line for each chain. Needs matplotlib.

    Lines within the dotted ones cannot be told from independent draws (about 95 % of the lags of
    these lie there).

    Args:
        draws: shape (chains, draws) or (chains, draws, quantities), at least 4 draws, at most 12
            quantities.
        names: of the quantities; None: their numbers.
        max_lag: the largest lag shown, as far as there are draws.

    Raises:
        ValueError: for another shape, more quantities, or as many names as do not fit; for draws
            that are not finite.
    """
    chains = _few_quantities(draws)
    length = chains.shape[1]
    correlation = autocorrelation(chains, min(max_lag, length - 1))
    figure, rows = _rows(chains.shape[2], names)
    for axes, values in zip(rows, correlation.unbind(2), strict=True):
        for number, chain in enumerate(values):
            axes.plot(chain.numpy(), linewidth=0.8, label=f"chain {number}")
        for limit in (-2 / length**0.5, 2 / length**0.5):
            axes.axhline(limit, color="grey", linestyle=":", linewidth=0.8)
    rows[-1].set_xlabel("lag in draws")
    if len(chains) > 1:
        rows[0].legend(loc="upper right", fontsize="small")
    return figure


def _few_quantities(draws: Tensor) -> Tensor:
    """On the CPU, shape (chains, draws, quantities)."""
    chains = draws.unsqueeze(-1) if draws.ndim == 2 else draws
    if chains.ndim != 3 or not 1 <= chains.shape[2] <= MOST_QUANTITIES:
        raise ValueError(
            "Expected draws of shape (chains, draws) or (chains, draws, quantities) with 1 to "
            f"{MOST_QUANTITIES} quantities, got shape {tuple(draws.shape)}. Choose a few of them."
        )
    return chains.detach().to("cpu", torch.float64)


def _rows(quantities: int, names: Sequence[str] | None) -> tuple[Figure, list[Axes]]:
    """A figure with one wide panel for each quantity."""
    from matplotlib.figure import Figure

    names = [str(number) for number in range(quantities)] if names is None else names
    if len(names) != quantities:
        raise ValueError(f"Expected a name for each of {quantities} quantities, got {len(names)}.")
    figure = Figure(figsize=(7, 0.6 + 1.2 * quantities), layout="constrained")
    rows = [figure.add_subplot(quantities, 1, number) for number in range(1, quantities + 1)]
    for axes, name in zip(rows, names, strict=True):
        axes.set_ylabel(name)
    for axes in rows[:-1]:
        axes.tick_params(labelbottom=False)
    return figure, rows
