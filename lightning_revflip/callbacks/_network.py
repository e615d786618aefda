"""The part of a module that a sampler's callback copies or lets answer for samples."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_revflip.callbacks._conversion import callbacks_of, run_after
from lightning_revflip.sgld import ParallelChains


def part_of(pl_module: LightningModule, path: str | None) -> nn.Module:
    """A part by its path; the module itself if that is None.

    Raises:
        MisconfigurationException: if there is none, with the names that there are.
    """
    if path is None:
        return pl_module
    try:
        return pl_module.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in pl_module.named_modules() if name)
        raise MisconfigurationException(
            f"SGLDSampler(network={path!r}): {type(pl_module).__name__} has no such part. It has: "
            f"{names or 'none'}."
        ) from None


def copy_part(
    pl_module: LightningModule, path: str, chains: int, combine: Callable[[Tensor], Tensor]
) -> None:
    """Put parallel chains in the place of a part, now or right after the hook that makes it."""
    copy = functools.partial(_copy, pl_module, path, chains, combine)
    late = [
        hook
        for hook in ("setup", "configure_model")
        if is_overridden(hook, pl_module, parent=LightningModule)
    ]
    copy()
    for hook in late:
        run_after(pl_module, hook, copy)


def _copy(
    pl_module: LightningModule, path: str, chains: int, combine: Callable[[Tensor], Tensor]
) -> None:
    try:
        part = pl_module.get_submodule(path)
    except AttributeError:
        return  # made later, or missing, which `part_of` tells
    if not isinstance(part, ParallelChains):
        pl_module.set_submodule(path, ParallelChains(part, chains, combine=combine))


def check_not_averaged_before(trainer: Trainer, callback: Callback) -> None:
    """Raise if another callback copies the module before this one changes it."""
    callbacks = callbacks_of(trainer)
    for earlier in callbacks[: callbacks.index(callback)]:
        if isinstance(earlier, WeightAveraging | StochasticWeightAveraging):
            name = type(earlier).__name__
            raise MisconfigurationException(
                f"{name} copies the module in `setup`, so SGLDSampler(chains=...) must come before "
                f"it. Put SGLDSampler before {name} in the list of callbacks."
            )
