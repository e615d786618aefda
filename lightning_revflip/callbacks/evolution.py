"""`EvolutionStrategies`: train any LightningModule without a backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_revflip.callbacks._conversion import callbacks_of
from lightning_revflip.callbacks.loggers import log_settings
from lightning_revflip.flipout.evolution import FlipoutES
from lightning_revflip.flipout.evolution.fitness import Shaping
from lightning_revflip.flipout.evolution.settings import (
    check_examples,
    check_loss,
    check_sigma,
    check_targets,
    check_whole,
)
from lightning_revflip.modules.evolution import check_layers
from lightning_revflip.modules.replicas import replica


class EvolutionStrategies(Callback):
    """Replaces the gradients of an ordinary LightningModule by those of `FlipoutES`.

    The module keeps its `training_step` and its optimizer, and the Trainer its accumulation of
    gradients and its clipping. Each training batch makes one generation: where backward would run,
    the members are evaluated on the batch, and the estimate of the gradient is written.

    The fitness of a member is minus its mean loss over its examples. Losses of single examples come
    from the module's method `per_example_loss(batch)`, a tensor (examples,); or, with `loss`, from
    `loss(module(inputs), targets)` for a batch of these two. `training_step` runs as well, without
    perturbation, and what it logs stays; its loss is not used.

    Logs `evolution/fitness_mean`, `evolution/fitness_best`, `evolution/gradient_norm` and
    `evolution/members_per_second`.

    Checkpoint: seed and generation, so that a resumed run has the members that the other would have
    had. The model is that of a run without the callback.

    Under DDP each process evaluates its share of the members. Processes with the same batch, or
    with the parts of one batch in order, train as one process with this batch does.

    A Trainer can have one of them; `targets` may choose several parts of a model.

    Does not work with manual optimization, with 16-bit mixed precision, whose scaling is for
    backward passes (use bf16-mixed), with LearningRateFinder and BatchSizeFinder, which would try
    backward passes, with perturbed layers that are compiled, and with strategies that cut up
    parameters.

    Args:
        sigma: standard deviation of the perturbations.
        population: number of members, of all processes together.
        base_perturbations: how many independent perturbations members are made from.
        antithetic: whether members come in pairs.
        shaping: what the fitness of a member counts: `rank`, `standardized` or `none`.
        examples: number of examples of each member. They follow one another through the batch,
            which is read again from its start where it ends; None: the whole batch.
        targets: glob patterns that name the modules to perturb; None: all.
        loss: from outputs and targets to one loss for each example, for modules without
            `per_example_loss`.
        seed: of the perturbations; the same in all processes.

    Raises:
        MisconfigurationException: at the start of training, if module or Trainer do not fit.
        ValueError: for settings of the wrong kind; at the start of training, for settings that do
            not fit together and parameters that cannot be perturbed; in training, if losses are
            not equally many for each member.

    Examples:
        >>> from torch.nn import CrossEntropyLoss
        >>> loss = CrossEntropyLoss(reduction="none")
        >>> evolution = EvolutionStrategies(sigma=0.05, population=512, examples=4, loss=loss)
        >>> trainer = Trainer(callbacks=[evolution], logger=False)
    """

    def __init__(
        self,
        sigma: float,
        population: int,
        base_perturbations: int = 1,
        antithetic: bool = True,
        shaping: Shaping = "rank",
        examples: int | None = None,
        targets: Sequence[str] | None = None,
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        check_sigma(sigma)
        check_whole("population", population)
        check_whole("base_perturbations", base_perturbations)
        check_whole("seed", seed, least=None)
        check_examples(examples)
        check_targets(targets)
        check_loss(loss)
        self.sigma = sigma
        self.population = population
        self.base_perturbations = base_perturbations
        self.antithetic = antithetic
        self.shaping: Shaping = shaping
        self.examples = examples
        self.targets = targets
        self.loss = loss
        self.seed = seed
        self.evolution: FlipoutES | None = None
        """The population, from the start of training on."""
        self._state: dict[str, Any] | None = None
        self._batch: Any = None
        self._metrics: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(each, EvolutionStrategies) for each in callbacks_of(trainer)) > 1:
            raise MisconfigurationException(
                "the Trainer has more than one EvolutionStrategies, and each would replace the "
                "gradients of the other. Use one; its targets may choose several parts of a model."
            )
        for each in callbacks_of(trainer):
            if isinstance(each, LearningRateFinder | BatchSizeFinder):
                raise MisconfigurationException(
                    f"{_name(each)} tries values before EvolutionStrategies stands in for the "
                    "backward pass, so it would find one for training by backpropagation. Choose "
                    "the value without it."
                )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "EvolutionStrategies stands in for the backward pass of automatic optimization, "
                f"and {type(pl_module).__name__} optimizes manually. Use "
                "lightning_revflip.flipout.evolution.FlipoutES in its training_step."
            )
        if self.loss is None and not hasattr(pl_module, "per_example_loss"):
            raise MisconfigurationException(
                f"EvolutionStrategies needs losses of single examples: give {_name(pl_module)} a "
                "method per_example_loss(batch) that returns (examples,), or the callback a loss, "
                "such as loss=CrossEntropyLoss(reduction='none')."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "EvolutionStrategies has no backward pass whose loss could be scaled, as 16-bit "
                "mixed precision does. Use precision='bf16-mixed' or '32-true'."
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                "EvolutionStrategies needs all parameters in each process, got "
                f"{_name(trainer.strategy)}. Use one device or strategy='ddp'."
            )
        log_settings(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evolution = FlipoutES(
            pl_module,
            self.sigma,
            self.population,
            self.base_perturbations,
            self.antithetic,
            shaping=self.shaping,
            targets=self.targets,
            seed=self.seed,
        )
        if self._state is not None:
            self.evolution.load_state_dict(self._state)
        self.evolution.share(*replica(trainer))
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = False  # it would wait for a backward pass

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._evolve(trainer, pl_module)

        pl_module.backward = backward  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_layers(pl_module, self.targets)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def _evolve(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a generation on the batch, and add the estimate to the gradients."""
        assert self.evolution is not None
        start = time.perf_counter()
        rows = self.evolution.repeat(self._batch, self.examples)
        with trainer.precision_plugin.forward_context(), self.evolution.members():
            losses = self._losses(pl_module, rows)
        everyone = self.evolution.gradient(
            self.evolution.fitness_of_losses(losses),
            accumulate=True,  # the Trainer has set gradients to zero where they should be
            scale=1 / trainer.accumulate_grad_batches,
        )
        self.evolution.next_generation()
        self._metrics = {
            "evolution/fitness_mean": everyone.mean(),
            "evolution/fitness_best": everyone.max(),
            "evolution/gradient_norm": self.evolution.gradient_norm(),
            "evolution/members_per_second": len(everyone) / (time.perf_counter() - start),
        }

    def _losses(self, pl_module: LightningModule, batch: Any) -> Tensor:
        if self.loss is None:
            per_example_loss: Any = pl_module.per_example_loss
            losses: Tensor = per_example_loss(batch)
            return losses
        inputs, targets = batch
        losses = self.loss(pl_module(inputs), targets)
        return losses

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        if self._metrics:
            pl_module.log_dict(self._metrics, batch_size=1)
            self._metrics = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vars(pl_module).pop("backward", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        vars(pl_module).pop("backward", None)

    @property
    def state_key(self) -> str:
        # Lets a second one get as far as `setup`, which says what is wrong.
        targets = None if self.targets is None else [str(target) for target in self.targets]
        return self._generate_state_key(targets=targets)

    def state_dict(self) -> dict[str, Any]:
        if self.evolution is None:
            return self._state or {}
        return {**self.evolution.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict) or None


def _name(thing: object) -> str:
    return type(thing).__name__
