"""Checks of settings that several classes take, before anything is computed with them."""

from __future__ import annotations

import math
from typing import Any


def check_whole(name: str, value: Any, least: int | None = 1) -> None:
    """Raise a ValueError unless a setting is an int, and not below `least`."""
    if type(value) is not int or (least is not None and value < least):
        bound = "" if least is None else f" from {least}"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r}.")


def check_sigma(sigma: Any) -> None:
    """Raise a ValueError unless it is a standard deviation above 0."""
    if not isinstance(sigma, int | float) or not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be a positive standard deviation, got {sigma!r}.")


def check_examples(examples: Any) -> None:
    """Raise a ValueError unless it is a number of examples, or None for all of a batch."""
    if examples is not None and (type(examples) is not int or examples < 1):
        raise ValueError(
            "examples must be a whole number from 1, or None for the whole batch; got "
            f"{examples!r}."
        )


def check_targets(targets: Any) -> None:
    """Raise a ValueError unless they are a list of patterns and types, or None for all modules."""
    if targets is not None and (
        isinstance(targets, str | type)
        or not all(isinstance(target, str | type) for target in targets)
    ):
        raise ValueError(f"targets must be a list of patterns or types, got {targets!r}.")


def check_loss(loss: Any) -> None:
    """Raise a ValueError unless it may give a loss for each example, or is None for the default."""
    if loss is not None and not callable(loss):
        raise ValueError(
            "loss must be a function of outputs and targets that gives one loss for each example, "
            f"such as CrossEntropyLoss(reduction='none'), got {loss!r}."
        )
    reduction = getattr(loss, "reduction", "none")
    if reduction != "none":
        name = type(loss).__name__
        raise ValueError(
            f"loss must give one number for each example, and {name} has reduction="
            f"{reduction!r}, one for all of them. Use {name}(reduction='none')."
        )
