"""`ReversibleRNN`: make the recurrent layers of any LightningModule reversible."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_revflip.convert import SPEC_KEY, ConversionSpec, convert, recorded_spec
from lightning_revflip.reversible import RevGRU, RevLSTM

_RULES: dict[type[nn.Module], Any] = {nn.GRU: RevGRU, nn.LSTM: RevLSTM}


class ReversibleRNN(Callback):
    """Replaces every nn.GRU by RevGRU and every nn.LSTM by RevLSTM.

    Acts in `setup` of every stage, before optimizers are made and weights are restored, so
    `fit(ckpt_path=...)`, `validate`, `test` and `predict` see the same model. Layers that the
    module makes in its own `setup` or in `configure_model` are replaced right after that hook.

    Replaced layers start from their own initialisation: the shapes of their recurrent weights
    differ from those of nn.GRU and nn.LSTM, whose weights cannot be carried over.

    Checkpoints hold what was converted. They resume in a Trainer with this callback; without one,
    load them by `lightning_revflip.convert.load_from_checkpoint`.

    Does not work with nn.RNN, cells (nn.GRUCell, nn.LSTMCell), `proj_size`, subclasses of nn.GRU
    and nn.LSTM, and odd hidden sizes: `setup` raises and names the layer. Callbacks
    that average weights must come after this one in the Trainer's list, and strategies that spawn
    or fork need a model that was converted before; otherwise `setup` raises.

    Args:
        max_forget_bits: how much a unit may forget per step: a number of bits, or None for no
            limit; 0 leaves forgetting out.
        targets: glob patterns of module paths, for example `["encoder.*"]`, or module types, that
            choose the layers; None: all.
        chunk_steps: steps that are recomputed together in the backward pass; None chooses.
        forget_bias: added to the bias of the forget gates at initialisation; below 0 the network
            starts by forgetting much, which may help RevLSTM at first and stores more bits.

    Raises:
        ValueError: in `setup`, if there is nothing to convert or something cannot be.
        MisconfigurationException: in `setup`, if a callback that averages weights comes first, or
            the strategy spawns.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos import LightningTransformer
        >>> trainer = Trainer(callbacks=[ReversibleRNN(max_forget_bits=2.0)], logger=False)
        >>> trainer.callbacks[0].max_forget_bits
        2.0
    """

    def __init__(
        self,
        max_forget_bits: float | None = 3.0,
        targets: Sequence[str | type[nn.Module]] | None = None,
        chunk_steps: int | None = None,
        forget_bias: float = 0.0,
    ) -> None:
        self.max_forget_bits = max_forget_bits
        self.targets = targets
        self.chunk_steps = chunk_steps
        self.forget_bias = forget_bias
        self.spec = ConversionSpec()
        """What was converted in the model that was set up last."""

    @property
    def state_key(self) -> str:
        # Two callbacks with different targets may convert different parts of one model.
        targets = None if self.targets is None else [str(target) for target in self.targets]
        return self._generate_state_key(targets=targets)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._check_order(trainer)
        self._check_launcher(trainer, pl_module)
        deferred = [
            hook
            for hook in ("setup", "configure_model")
            if is_overridden(hook, pl_module, parent=LightningModule)
        ]
        self._convert(pl_module, more_to_come=bool(deferred))
        for hook in deferred:
            more_to_come = hook != deferred[-1]
            _run_after(pl_module, hook, functools.partial(self._convert, pl_module, more_to_come))

    def _convert(self, pl_module: LightningModule, more_to_come: bool) -> None:
        spec = convert(
            pl_module,
            _RULES,
            self.targets,
            strict=not more_to_come,
            max_forget_bits=self.max_forget_bits,
            chunk_steps=self.chunk_steps,
            forget_bias=self.forget_bias,
        )
        self.spec = recorded_spec(pl_module)
        for conversion in spec.conversions:
            name = conversion.replacement.split(":")[1]
            rank_zero_info(f"ReversibleRNN: {' = '.join(conversion.paths)} is now a {name}")

    def _check_order(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        for callback in before:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                name = type(callback).__name__
                raise MisconfigurationException(
                    f"{name} copies the model in `setup`, so ReversibleRNN must convert it before "
                    f"that. Put ReversibleRNN before {name} in the list of callbacks."
                )

    def _check_launcher(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spawned = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        if spawned and not recorded_spec(pl_module).conversions:
            raise MisconfigurationException(
                "With a spawn or fork strategy the main process keeps an unconverted copy of the "
                "model and could not take over the trained weights. Use strategy='ddp', or call "
                "lightning_revflip.convert.convert(model, ...) before the Trainer starts."
            )

    def state_dict(self) -> dict[str, Any]:
        return {SPEC_KEY: self.spec.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = ConversionSpec.from_dict(state_dict[SPEC_KEY])
        if saved != self.spec:
            rank_zero_warn(
                "The checkpoint was written with other settings of ReversibleRNN; its weights now "
                f"run in a different model. Saved: {saved.conversions}. Now: "
                f"{self.spec.conversions}."
            )


def _run_after(pl_module: LightningModule, hook: str, action: Callable[[], None]) -> None:
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
