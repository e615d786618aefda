"""What loggers are given beside numbers: figures, tables, files, and the settings of callbacks.

WandbLogger takes all of them, TensorBoardLogger figures and tables. Other loggers are left alone,
except for settings, which all of them take.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# --- figures ---------------------------------------------------------------------------------


def can_draw() -> bool:
    """Whether matplotlib is installed; warns once in a process if it is not."""
    found = find_spec("matplotlib") is not None
    if not found:
        _warn_without_matplotlib()
    return found


@functools.cache
def _warn_without_matplotlib() -> None:
    rank_zero_warn(
        "No figures are drawn, because matplotlib is not installed. Install it for figures: "
        "pip install matplotlib. Everything else is logged without it."
    )


def media_loggers(trainer: Trainer) -> list[Logger]:
    """The loggers of a Trainer that take figures and tables."""
    kinds = WandbLogger | TensorBoardLogger
    return [logger for logger in trainer.loggers if isinstance(logger, kinds)]


def figure_loggers(trainer: Trainer) -> list[Logger]:
    """The loggers of a Trainer that take figures; none where figures cannot be drawn."""
    loggers = media_loggers(trainer)
    return loggers if loggers and can_draw() else []


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Give a figure to a logger that takes figures."""
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, step)


# --- tables and files ------------------------------------------------------------------------


def log_table(
    logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Give a table to a logger that takes tables, to TensorBoard as a text in Markdown."""
    if isinstance(logger, WandbLogger):
        logger.log_table(name, list(columns), [list(row) for row in rows], step=step)
    elif isinstance(logger, TensorBoardLogger):
        cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
        lines = [list(columns), ["---"] * len(columns), *cells]
        logger.experiment.add_text(name, "\n".join(" | ".join(line) for line in lines), step)


def log_artifact(logger: Logger, name: str, kind: str, path: Path) -> None:
    """Give W&B a file or a folder as an artifact of the run; offline it waits for `wandb sync`.

    Args:
        logger: of any kind; only WandbLogger takes artifacts.
        name: begins the name of the artifact, which ends with the id of the run.
        kind: the type of the artifact.
        path: the file or folder.
    """
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    artifact = wandb.Artifact(f"{name}-{logger.version}", type=kind)
    if path.is_dir():
        artifact.add_dir(str(path))
    else:
        artifact.add_file(str(path))
    logger.experiment.log_artifact(artifact)


# --- settings --------------------------------------------------------------------------------


def log_settings(trainer: Trainer, callback: Callback) -> None:
    """Give the arguments of a callback to the loggers, as hyperparameters under its class name.

    The second callback of one class has `_2` behind its name, and so on.
    """
    name = type(callback).__name__
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    earlier = itertools.takewhile(lambda each: each is not callback, callbacks)
    number = 1 + sum(type(each) is type(callback) for each in earlier)
    settings = {name if number == 1 else f"{name}_{number}": settings_of(callback)}
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)


def settings_of(callback: Callback) -> dict[str, Any]:
    """The arguments of a callback, of those that it keeps in an attribute of their name.

    Returns:
        None, numbers, strings, lists and dicts.
    """
    names = inspect.signature(type(callback)).parameters
    return {name: _plain(getattr(callback, name)) for name in names if hasattr(callback, name)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, type) or inspect.isfunction(value):
        return value.__qualname__
    if isinstance(value, functools.partial):
        # That of a LightningCLI calls a helper, with the class of the configuration as argument.
        made = next((each for each in value.args if isinstance(each, type)), value.func)
        path = f"{made.__module__}:{_plain(made)}"
        return {"class_path": path, "init_args": _plain(value.keywords)}
    if hasattr(value, "to_config"):
        return _plain(value.to_config())
    if hasattr(value, "hparams"):
        return _plain(dict(value.hparams))
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text  # an address is no setting
