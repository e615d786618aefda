"""What `configure_optimizers` returns, with a sampler in the place of its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_revflip.sgld import CyclicalSchedule, LangevinOptimizer

MakeSampler = Callable[[Optimizer], LangevinOptimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]


def swap_optimizer(
    pl_module: LightningModule, make: MakeSampler, schedule: MakeSchedule | None
) -> Callable[[], None]:
    """Let `configure_optimizers` return a sampler in place of its optimizer.

    Args:
        pl_module: whose method is replaced.
        make: makes the sampler of the optimizer.
        schedule: makes a schedule of the sampler, stepped with it; for modules that return none.

    Returns:
        A function that restores the method.
    """
    original = pl_module.configure_optimizers
    previous = vars(pl_module).get("configure_optimizers")

    def configure() -> Any:
        configured = replace_optimizer(original(), make)
        return configured if schedule is None else add_schedule(configured, schedule)

    def undo() -> None:
        if previous is None:
            vars(pl_module).pop("configure_optimizers", None)
        else:
            setattr(pl_module, "configure_optimizers", previous)  # noqa: B010

    setattr(pl_module, "configure_optimizers", configure)  # noqa: B010
    return undo


def replace_optimizer(configured: Any, make: MakeSampler) -> Any:
    """Replace the optimizer in what `configure_optimizers` returned, and tell its schedules.

    Args:
        configured: in any of the forms that Lightning takes.
        make: makes the new optimizer of the one found.

    Returns:
        The same form with the new optimizer.

    Raises:
        MisconfigurationException: unless there is exactly one optimizer.
    """
    found = list({id(each): each for each in _optimizers(configured)}.values())
    if len(found) != 1:
        raise MisconfigurationException(
            f"SGLDSampler needs the module to have one optimizer, got {len(found)} from "
            "configure_optimizers. Put all parameters into groups of one optimizer."
        )
    sampler = make(found[0])
    if sampler is found[0]:
        return configured
    _mark_steps(sampler)
    return _replaced(configured, sampler)


def add_schedule(configured: Any, schedule: MakeSchedule) -> dict[str, Any]:
    """Give the one optimizer in what `configure_optimizers` returned a schedule of steps.

    Raises:
        MisconfigurationException: if it has one already.
    """
    if _schedulers(configured):
        raise MisconfigurationException(
            "SGLDSampler has a schedule, and configure_optimizers returns one as well. Leave out "
            "the one or the other."
        )
    optimizer = _optimizers(configured)[0]
    scheduler = {"scheduler": schedule(optimizer), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _optimizers(configured: Any) -> list[Optimizer]:
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return [each for part in configured for each in _optimizers(part)]
    return []


def _schedulers(configured: Any) -> list[LRScheduler | ReduceLROnPlateau]:
    if isinstance(configured, LRScheduler | ReduceLROnPlateau):
        return [configured]
    if isinstance(configured, dict):
        return [each for part in configured.values() for each in _schedulers(part)]
    if isinstance(configured, list | tuple):
        return [each for part in configured for each in _schedulers(part)]
    return []


def parts_of(scheduler: Any) -> list[Any]:
    """A schedule and those that it consists of, as SequentialLR and ChainedScheduler do."""
    inner = getattr(scheduler, "_schedulers", ())
    return [scheduler, *(each for part in inner for each in parts_of(part))]


def _replaced(configured: Any, sampler: LangevinOptimizer) -> Any:
    if isinstance(configured, Optimizer):
        return sampler
    if isinstance(configured, LRScheduler | ReduceLROnPlateau):
        _rebind(configured, sampler)
        return configured
    if isinstance(configured, dict):
        return {key: _replaced(value, sampler) for key, value in configured.items()}
    if isinstance(configured, list | tuple):
        return type(configured)([_replaced(each, sampler) for each in configured])
    return configured


def _rebind(scheduler: LRScheduler | ReduceLROnPlateau, sampler: LangevinOptimizer) -> None:
    for part in parts_of(scheduler):
        part.optimizer = sampler
        if isinstance(part, CyclicalSchedule):
            part.set_temperatures()


def _mark_steps(optimizer: Any) -> None:
    """Note that steps are taken, as schedulers do with the optimizer that they are made for."""
    step = optimizer.step

    def marked(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(*args, **kwargs)

    marked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = marked
