"""What callbacks that convert the layers of a model have in common."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_revflip.callbacks.loggers import log_settings
from lightning_revflip.convert import SPEC_KEY, ConversionSpec, convert, recorded_spec


class ConversionCallback(Callback, ABC):
    """Converts layers in `setup` of every stage, and records in checkpoints what was converted.

    That is before optimizers are made and weights are restored. Layers that the module makes in
    its own `setup` or in `configure_model` are converted right after that hook. What has been
    converted before is left alone.

    Args:
        targets: glob patterns of module paths, or module types, that choose the layers; None: all.
    """

    def __init__(self, targets: Sequence[str | type[nn.Module]] | None = None) -> None:
        self.targets = targets
        self.spec = ConversionSpec()
        """What was converted in the model that was set up last."""

    @abstractmethod
    def rules(self) -> Mapping[type[nn.Module], Any]:
        """What becomes of a layer, by its type."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Arguments of the new layers."""

    @property
    def state_key(self) -> str:
        # Two callbacks with different targets may convert different parts of one model.
        targets = None if self.targets is None else [str(target) for target in self.targets]
        return self._generate_state_key(targets=targets)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._check_order(trainer)
        log_settings(trainer, self)
        deferred = [
            hook
            for hook in ("setup", "configure_model")
            if is_overridden(hook, pl_module, parent=LightningModule)
        ]
        self._convert(trainer, pl_module, bool(deferred))
        for hook in deferred:
            arguments = (trainer, pl_module, hook != deferred[-1])
            run_after(pl_module, hook, functools.partial(self._convert, *arguments))

    def _convert(self, trainer: Trainer, pl_module: LightningModule, more_to_come: bool) -> None:
        spec = convert(
            pl_module, self.rules(), self.targets, strict=not more_to_come, **self.arguments()
        )
        spawned = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        if spawned and spec.conversions:
            raise MisconfigurationException(
                "With a spawn or fork strategy the main process keeps an unconverted copy of the "
                "model and could not take over the trained weights. Use strategy='ddp', or call "
                "lightning_revflip.convert.convert(model, ...) before the Trainer starts."
            )
        self.spec = recorded_spec(pl_module)
        for conversion in spec.conversions:
            name = conversion.replacement.split(":")[1]
            paths = " = ".join(path or "the model itself" for path in conversion.paths)
            rank_zero_info(f"{type(self).__name__}: {paths} is now a {name}")

    def _check_order(self, trainer: Trainer) -> None:
        for callback in callbacks_of(trainer):
            if callback is self:
                return
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                name, own = type(callback).__name__, type(self).__name__
                raise MisconfigurationException(
                    f"{name} copies the model in `setup`, so {own} must convert it before that. "
                    f"Put {own} before {name} in the list of callbacks."
                )

    def state_dict(self) -> dict[str, Any]:
        return {SPEC_KEY: self.spec.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = ConversionSpec.from_dict(state_dict[SPEC_KEY])
        if saved != self.spec:
            rank_zero_warn(
                f"The checkpoint was written with other settings of {type(self).__name__}; its "
                f"weights now run in a different model. Saved: {saved.conversions}. Now: "
                f"{self.spec.conversions}."
            )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer in their order."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def run_after(pl_module: LightningModule, hook: str, action: Callable[[], None]) -> None:
    """Let `pl_module` run `action` after the next call of one of its hooks."""
    original = getattr(pl_module, hook)
    previous = vars(pl_module).get(hook)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if previous is None:
            delattr(pl_module, hook)
        else:
            setattr(pl_module, hook, previous)
        result = original(*args, **kwargs)
        action()
        return result

    setattr(pl_module, hook, wrapped)
