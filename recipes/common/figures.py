"""Figures of what the reversible layers store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_revflip.callbacks.loggers import figure_loggers, log_figure
from lightning_revflip.reversible import memory_report
from lightning_revflip.reversible.report import LayerReport, Recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GATE_STEPS = 1024  # forget gates are multiples of 1 / GATE_STEPS


def bits_figure(layers: Sequence[LayerReport]) -> Figure:
    """Bars of the bits that each layer stored per unit and step.

    Args:
        layers: of a `MemoryReport`, at least one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1 + 0.4 * len(layers)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [layer.name for layer in layers], [layer.bits_per_unit_step for layer in layers], height=0.6
    )
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=3)  # type: ignore[arg-type]
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("stored bits per unit and step (a float state: 32)")
    return figure


def gates_figure(layers: Sequence[LayerReport], bins: int = 64) -> Figure:
    """Histogram of the forget gates of each layer.

    Args:
        layers: of a `MemoryReport`, at least one.
        bins: number of bins between 0 and 1, a divisor of 1024.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    edges = torch.linspace(0, 1, bins + 1)
    for layer in layers:
        axes.stairs(gate_shares(layer.gate_counts, bins).numpy(), edges.numpy(), label=layer.name)
    axes.set_xlabel("forget gate")
    axes.set_ylabel("share")
    axes.set_xlim(0, 1)
    axes.legend(loc="upper left")
    return figure


def gate_shares(counts: Tensor, bins: int) -> Tensor:
    """Share of the gates in each of `bins` equal intervals; a gate of exactly 1 is in the last.

    Args:
        counts: how often a forget gate was k / 1024, shape (1025,).
        bins: a divisor of 1024.

    Returns:
        float32, shape (bins,); sums to 1, or is all zero if nothing was counted.

    Raises:
        ValueError: if `bins` does not divide 1024 or `counts` has another shape.

    >>> gate_shares(torch.bincount(torch.tensor([0, 511, 512, 1024]), minlength=1025), bins=2)
    tensor([0.5000, 0.5000])
    """
    if counts.shape != (GATE_STEPS + 1,) or GATE_STEPS % bins:
        raise ValueError(
            f"Expected {GATE_STEPS + 1} counts and a number of bins that divides {GATE_STEPS}, got "
            f"counts of shape {tuple(counts.shape)} and {bins} bins."
        )
    counts = counts.cpu().float()
    shares = counts[:-1].view(bins, -1).sum(1)
    shares[-1] += counts[-1]
    return shares / counts.sum().clamp(min=1)


def ran_reversibly(module: nn.Module) -> bool:
    """Whether there is something to draw: a reversible layer that has run."""
    return any(isinstance(part, Recorded) and part.last_passes for part in module.modules())


class ReversibleFigures(Callback):
    """Logs what the reversible layers store: bits per layer, and a histogram of the forget gates.

    Draws `reversible/bits_per_layer` and `reversible/forget_gates` for WandbLogger and
    TensorBoardLogger, and does nothing with another logger or for a model without reversible
    layers. Without matplotlib there is a warning in place of figures.

    Args:
        every_n_steps: optimizer steps between two figures; the first is drawn at step 1.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._drawn_at = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 1 % self.every_n_steps and step != self._drawn_at
        if not (due and trainer.is_global_zero and ran_reversibly(pl_module)):
            return
        loggers = figure_loggers(trainer)
        if not loggers:
            return
        self._drawn_at = step
        layers = memory_report(pl_module).layers
        for logger in loggers:
            log_figure(logger, "reversible/bits_per_layer", bits_figure(layers), step)
            log_figure(logger, "reversible/forget_gates", gates_figure(layers), step)
