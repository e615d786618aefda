"""Figures of generated networks against real samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_revflip.posterior import Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"samples": "tab:blue", "generated": "tab:orange"}


def projections_figure(real: Tensor, generated: Tensor, panels: int = 4) -> Figure:
    """Codes in planes of two of their coordinates: the first two, the next two, and so on.

    Args:
        real: codes of samples, shape (n, size).
        generated: generated codes, shape (m, size).
        panels: number of planes, fewer if codes have fewer coordinates.
    """
    last = real.shape[1] - 1
    planes = [(2 * i, min(2 * i + 1, last)) for i in range(min(panels, last // 2 + 1))]
    figure, places = _panels(len(planes))
    for axes, (x, y) in zip(places, planes, strict=True):
        for (name, colour), codes in zip(_COLOURS.items(), (real, generated), strict=True):
            axes.scatter(codes[:, x], codes[:, y], s=6, alpha=0.6, color=colour, label=name)
        axes.set_xlabel(f"coordinate {x}")
        axes.set_ylabel(f"coordinate {y}")
    places[0].legend()
    return figure


def marginals_figure(real: Tensor, generated: Tensor, layout: Layout, panels: int = 8) -> Figure:
    """Histograms of single weights: of each tensor the one that varies most over the samples.

    Args:
        real: weights of samples, shape (n, P).
        generated: generated weights, shape (m, P).
        layout: says where they are in a row.
        panels: number of tensors, the first ones.
    """
    parts, others = (layout.unflatten(rows) for rows in (real, generated))
    names = list(parts)[:panels]
    figure, places = _panels(len(names))
    for axes, name in zip(places, names, strict=True):
        weights = parts[name].flatten(1)
        widest = int(weights.var(0).argmax())
        columns = weights[:, widest], others[name].flatten(1)[:, widest]
        low, high = (float(edge) for edge in torch.cat(columns).aminmax())
        for (label, colour), column in zip(_COLOURS.items(), columns, strict=True):
            axes.hist(
                column,
                bins=30,
                range=(low, high),
                density=True,
                alpha=0.5,
                color=colour,
                label=label,
            )
        axes.set_title(f"{name}, number {widest}", fontsize="small")
    places[0].legend()
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with some panels, four in a row."""
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
