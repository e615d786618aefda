"""Steps of a LightningModule that are run under several draws of its weights."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_revflip.flipout import sampling
from lightning_revflip.flipout.noise import derive

_SEED = 0xF11907


def sample_step(
    pl_module: LightningModule, name: str, samples: int, combine: Callable[[list[Any]], Any]
) -> Callable[[], None]:
    """Let a step run once under each of some draws of the weights.

    Draw k is one network: the same for every batch, in every call, process and run.

    Args:
        pl_module: holds flipout layers.
        name: of the step, for example `validation_step`.
        samples: number of draws.
        combine: makes one output of those of the draws.

    Returns:
        What undoes it.

    Raises:
        ValueError: for a step that takes the data loader's iterator, which passes once.
    """
    original = getattr(pl_module, name)
    previous = vars(pl_module).get(name)
    if "dataloader_iter" in inspect.signature(original).parameters:
        raise ValueError(
            f"{name} takes a dataloader_iter, and each of its batches can be fetched only once. "
            f"Let {name} take a batch, or evaluate with the mean weights."
        )

    @functools.wraps(original)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        for draw in range(samples):
            generator = torch.Generator().manual_seed(derive(_SEED, draw))
            with sampling(pl_module, "shared", generator):
                outputs.append(original(*args, **kwargs))
        return combine(outputs)

    def undo() -> None:
        if previous is None:
            delattr(pl_module, name)
        else:
            setattr(pl_module, name, previous)

    setattr(pl_module, name, sampled)
    return undo


def last(outputs: list[Any]) -> Any:
    """The output of the last draw."""
    return outputs[-1]


def stacked(outputs: list[Any]) -> Any:
    """The outputs with a new first dimension in every tensor.

    Raises:
        ValueError: if they hold something else than tensors.
    """
    return pytree.tree_map(_stack, *outputs)


def _stack(*parts: Any) -> Tensor:
    if not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            "predict_samples stacks the predictions of several networks, so predict_step must "
            f"return tensors (in lists, tuples or dicts), got {type(parts[0]).__name__}."
        )
    return torch.stack(parts)
