"""What the members of a generation earn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_revflip.callbacks.loggers import figure_loggers, log_figure
from recipes.es_cartpole.module import EvolvedPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def returns_figure(returns: Tensor, policy: float) -> Figure:
    """Histogram of the members' returns, with a line at that of the policy itself.

    Args:
        returns: of the members of a generation, shape (members,).
        policy: mean return of the policy without perturbation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(returns.numpy(), bins=30, label="members of the generation")
    axes.axvline(policy, color="tab:orange", label="policy without perturbation")
    axes.set_xlabel("return")
    axes.set_ylabel("members")
    axes.legend()
    return figure


class ReturnsFigure(Callback):
    """Draws `evolution/returns` after each validation, for WandbLogger and TensorBoardLogger.

    It shows the last generation. Nothing happens with other loggers; without matplotlib there is a
    warning in place of figures.

    Raises:
        TypeError: when validation ends, unless it is one of an `EvolvedPolicy`.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, EvolvedPolicy):
            raise TypeError(
                f"ReturnsFigure is about an EvolvedPolicy, got {type(pl_module).__name__}."
            )
        if pl_module.fitness is None or not trainer.is_global_zero:
            return  # before the first generation
        policy = float(trainer.callback_metrics["val/return"])
        for logger in figure_loggers(trainer):
            figure = returns_figure(pl_module.fitness.cpu(), policy)
            log_figure(logger, "evolution/returns", figure, trainer.global_step)
