"""`Flipout`: perturbed weights for the layers of any LightningModule, and their posterior."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_revflip.callbacks._conversion import ConversionCallback, callbacks_of
from lightning_revflip.callbacks._divergence import (
    add_gradient,
    check_optimizers,
    check_strategy,
    divergence,
    parameters_of,
    warn_of_weight_decay,
)
from lightning_revflip.callbacks._noise import (
    RecomputableNoise,
    fresh_generator,
    resumed_generator,
    states_of_all,
)
from lightning_revflip.callbacks._num_data import resolve_num_data
from lightning_revflip.callbacks._weight_samples import last, sample_step, stacked
from lightning_revflip.callbacks.reversible import ReversibleRNN
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    Gaussian,
    NoiseSource,
    Perturbation,
    PerturbedLayer,
)
from lightning_revflip.flipout.elbo import check_num_data, signal_to_noise, weights_with_prior
from lightning_revflip.flipout.layer import Estimator
from lightning_revflip.modules.replicas import replica
from lightning_revflip.reversible_flipout import REVERSIBLE_FLIPOUT_LAYERS

RULES: dict[type[nn.Module], type[PerturbedLayer]] = {**FLIPOUT_LAYERS, **REVERSIBLE_FLIPOUT_LAYERS}
"""The flipout layer of each layer that `Flipout` converts; may be added to."""


class Flipout(ConversionCallback):
    """Perturbs the weights of layers independently for each example, by flipout.

    Wen, Vicol, Ba, Tran and Grosse (2018), arXiv 1803.04386. Converts layers in `setup` of every
    stage; they keep their weights as means, so a checkpoint of the plain model can be loaded before
    fitting. Works before or after `ReversibleRNN`, whose RevGRU and RevLSTM get perturbed recurrent
    weights.

    **Training.** `training_step` stays as it is and returns the mean negative log-likelihood per
    example, in nats. With a prior (`Gaussian(prior_std=...)`, Bayes by backprop), the gradient of
    kl_weight / num_data * KL is added to that of the loss before each optimizer step: once per
    step under gradient accumulation, before Lightning clips gradients (a module that clips by
    itself in manual optimization does so without it), after unscaling with 16-mixed, after the
    mean over processes with DDP. With several optimizers each gets the gradient of its own
    parameters. A step without any gradient (`training_step` returned None) gets none. Losses that
    are logged do not include the divergence. Perturbations without a prior are noise alone.

    **Noise.** Each process draws from a generator of its own, which follows from `seed_everything`
    and its rank, so that DDP replicas perturb their examples differently. Every `fit` starts it
    anew. Checkpoints hold its state in all processes, so that a run resumes bit by bit at epoch
    boundaries (and within, as far as the data loader does); with more processes than before, the
    further ones start streams that follow from the state of the first. Each process of
    `IndependentChainsStrategy` draws and resumes as a run on one device. Forward calls that are
    recomputed (activation checkpointing, ReversibleSequence) draw the same noise again. Layers that
    are compiled draw from torch's global generators instead.

    **Evaluation** computes with the mean weights, unless `validate_samples` or `predict_samples`
    say otherwise. The networks drawn for that are the same in every evaluation, so curves over
    epochs are comparable, and training noise goes on as if there was no evaluation.

    **Logs**, whenever Lightning logs: `flipout/kl` (after the step, nats), `flipout/kl_weight` (as
    annealed) and, unless std is proportional to the mean, `flipout/signal_to_noise`: the median of
    |mean| / std over weights (of large models over an evenly spaced part). A second `Flipout` in
    one Trainer logs as `flipout_2/...`.

    **Limits.** Strategies that shard weights raise, and so do fused optimizers with 16-mixed and
    LBFGS with a line search, if they hold weights with a prior. Strategies that spawn need a model
    that was converted before; callbacks that average weights must come after this one. Flipout
    layers that the module made itself are treated alike, where `targets` choose them, and keep
    their own perturbation.

    Args:
        targets: glob patterns of module paths, for example `["encoder.*"]`, or module types, that
            choose the layers; None: all. Other layers need a second `Flipout`, with other targets:
            two with the same ones raise when the Trainer is made.
        perturbation: how weights are perturbed; None: `Gaussian()`.
        kl_weight: factor of the divergence; 1 is the posterior of Bayes, less is a cold one.
        num_data: number of training examples, all processes together, in the units over which the
            loss is a mean. None: the length of the training data loader's data set, also where
            `limit_train_batches` leaves some out.
        annealing_epochs: epochs in which kl_weight rises linearly from 0, with each batch, to reach
            its value in the last of them; may be a fraction.
        estimator: how examples of a batch are perturbed: `flipout`, `local_reparameterization` (for
            nn.Linear and Gaussian noise) or `shared`.
        base_perturbations: how many independent perturbations a batch gets.
        validate_samples: number of networks n on which validation and test are run; 0: the mean
            weights. Each batch passes n times through `validation_step` or `test_step`, and what
            these log is averaged over the networks (sums, `reduce_fx="sum"`, become n times as
            large). That is the mean metric of single networks, not the metric of their mean
            prediction; hooks get the output of the last network. For the latter use
            `lightning_revflip.sample_n` in the step.
        predict_samples: number of networks n for prediction; 0: the mean weights. The tensors that
            `predict_step` returns get a new first dimension of size n.
        layer_arguments: arguments of the flipout layers, for example `{"example_dim": 1}`.

    Raises:
        ValueError: for arguments out of range; in `setup`, if there is nothing to convert or
            something cannot be; when training starts, if the number of examples is needed and not
            known, or arguments concern a divergence and no weight has a prior.
        MisconfigurationException: for settings of the Trainer under which the gradient of the
            divergence would not be exact, or callbacks that conflict.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_revflip.flipout import Gaussian
        >>> bayes = Flipout(perturbation=Gaussian(init_std=0.02), annealing_epochs=5)
        >>> trainer = Trainer(callbacks=[bayes], logger=False)
        >>> trainer.callbacks[0].perturbation
        Gaussian(init_std=0.02, prior_std=1.0, learnable=True)
    """

    def __init__(
        self,
        targets: Sequence[str | type[nn.Module]] | None = None,
        perturbation: Perturbation | None = None,
        kl_weight: float = 1.0,
        num_data: int | None = None,
        annealing_epochs: float = 0,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        validate_samples: int = 0,
        predict_samples: int = 0,
        layer_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(targets)
        self.perturbation = Gaussian() if perturbation is None else perturbation
        self.kl_weight = _not_negative("kl_weight", kl_weight)
        self.annealing_epochs = _not_negative("annealing_epochs", annealing_epochs)
        self.num_data = num_data
        self.estimator = estimator
        self.base_perturbations = base_perturbations
        self.validate_samples = _count("validate_samples", validate_samples)
        self.predict_samples = _count("predict_samples", predict_samples)
        self.layer_arguments = {} if layer_arguments is None else dict(layer_arguments)
        if num_data is not None:
            check_num_data(num_data)
        self._noise: RecomputableNoise | None = None
        self._saved_noise: list[Tensor] | None = None
        self._processes = 1
        self._sources: list[tuple[PerturbedLayer, NoiseSource]] = []
        self._resolved_num_data: int | None = None
        self._last_kl_weight: float | None = None
        self._undo: list[Any] = []

    def rules(self) -> Mapping[type[nn.Module], Any]:
        return RULES

    def arguments(self) -> dict[str, Any]:
        return {
            "perturbation": self.perturbation,
            "estimator": self.estimator,
            "base_perturbations": self.base_perturbations,
            **self.layer_arguments,
        }

    def layers(self, model: nn.Module) -> list[PerturbedLayer]:
        """The flipout layers of a model that this callback is for, each once."""
        found: dict[int, PerturbedLayer] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, PerturbedLayer) and self._chooses(path, module):
                found[id(module)] = module
        return list(found.values())

    def _chooses(self, path: str, module: nn.Module) -> bool:
        return self.targets is None or any(
            fnmatchcase(path, target) if isinstance(target, str) else isinstance(module, target)
            for target in self.targets
        )

    # --- conversion --------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_strategy(trainer)
        _check_samples(_flipouts(trainer))
        self._saved_noise = None
        # It replaces layers, which must happen before they get a perturbation.
        callbacks = callbacks_of(trainer)
        for later in callbacks[callbacks.index(self) :]:
            if isinstance(later, ReversibleRNN):
                later.setup(trainer, pl_module, stage)
        super().setup(trainer, pl_module, stage)

    # --- fitting -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_disjoint(_flipouts(trainer), pl_module)
        layers = self.layers(pl_module)
        check_optimizers(trainer, weights_with_prior(layers))
        warn_of_weight_decay(trainer, layers)
        rank, self._processes = replica(trainer)
        if self._saved_noise is None:
            generator = fresh_generator(rank)
        else:
            generator = resumed_generator(self._saved_noise, rank)
        self._noise = RecomputableNoise(generator)
        self._sources = [(layer, layer.noise_source) for layer in layers]
        for layer in layers:
            layer.noise_source = self._noise

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resolved_num_data = None
        if not weights_with_prior(self._layers()):
            self._check_no_divergence()
            return
        if self.kl_weight == 0:
            return
        self._resolved_num_data = resolve_num_data(
            self.num_data, trainer.train_dataloader, "Flipout"
        )
        if self.annealing_epochs > 0 and trainer.num_training_batches == math.inf:
            raise ValueError(
                f"annealing_epochs={self.annealing_epochs} needs to know the number of batches in "
                "an epoch, which the training data loader does not tell. Set limit_train_batches "
                "of the Trainer, or leave annealing_epochs out."
            )

    def _layers(self) -> list[PerturbedLayer]:
        """The layers of the running fit."""
        return [layer for layer, _ in self._sources]

    def _check_no_divergence(self) -> None:
        """Raise if arguments concern a divergence that there is not."""
        given = {
            "kl_weight": self.kl_weight not in (0, 1),
            "num_data": self.num_data is not None,
            "annealing_epochs": self.annealing_epochs > 0,
        }
        found = [name for name, is_given in given.items() if is_given]
        if found:
            raise ValueError(
                f"{' and '.join(found)} would have no effect: {self.perturbation} has no prior, so "
                "there is no divergence. Leave them out, or use Gaussian(prior_std=...)."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._noise is not None:
            self._noise.forget()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._last_kl_weight = weight = self.kl_weight * self._annealed(trainer)
        parameters = parameters_of(optimizer)
        if self._resolved_num_data is None or all(each.grad is None for each in parameters):
            return
        weights = weights_with_prior(self._layers())
        add_gradient(weights, parameters, weight / self._resolved_num_data)

    def _annealed(self, trainer: Trainer) -> float:
        """How far annealing has come in the running batch, up to 1."""
        if self.annealing_epochs == 0:
            return 1.0
        batches = trainer.fit_loop.batch_idx + 1
        epochs = trainer.current_epoch + batches / trainer.num_training_batches
        return min(1.0, epochs / self.annealing_epochs)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        weight, self._last_kl_weight = self._last_kl_weight, None
        if weight is None or not trainer._logger_connector.should_update_logs:
            return
        layers = self._layers()
        values: dict[str, Tensor | float] = {}
        if self._resolved_num_data is not None:
            values["kl"] = divergence(weights_with_prior(layers))
            values["kl_weight"] = weight
        ratio = signal_to_noise(layers)
        if ratio is not None:
            values["signal_to_noise"] = ratio
        number = _flipouts(trainer).index(self) + 1
        prefix = "flipout" if number == 1 else f"flipout_{number}"
        pl_module.log_dict({f"{prefix}/{k}": value for k, value in values.items()}, batch_size=1)

    # --- evaluation --------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample("validation_step", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_sampling()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample("test_step", pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_sampling()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample("predict_step", pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_sampling()

    def _sample(self, step: str, pl_module: LightningModule) -> None:
        predicts = step == "predict_step"
        samples = self.predict_samples if predicts else self.validate_samples
        if samples > 0:
            combine = stacked if predicts else last
            self._undo.append(sample_step(pl_module, step, samples, combine))

    def _stop_sampling(self) -> None:
        while self._undo:
            self._undo.pop()()

    # --- afterwards --------------------------------------------------------------------------

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        """Leave the model as one that no Trainer holds."""
        self._stop_sampling()
        for layer, source in self._sources:
            layer.noise_source = source
        self._sources = []

    def state_dict(self) -> dict[str, Any]:
        noise = None
        if self._noise is not None and self._noise.generator is not None:
            noise = states_of_all(self._noise.generator, self._processes)
        return {**super().state_dict(), "noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        noise = state_dict["noise"]
        self._saved_noise = [noise] if isinstance(noise, Tensor) else noise  # of earlier versions


def _flipouts(trainer: Trainer) -> list[Flipout]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Flipout)]


def _check_samples(callbacks: Sequence[Flipout]) -> None:
    """Raise if steps would be run several times by more than one callback."""
    for name in ("validate_samples", "predict_samples"):
        if sum(getattr(callback, name) > 0 for callback in callbacks) > 1:
            raise MisconfigurationException(
                f"{name} of one Flipout callback samples the weights of all of them. Give it to "
                "one of them alone."
            )


def _check_disjoint(callbacks: Sequence[Flipout], model: nn.Module) -> None:
    """Raise if a weight belongs to two callbacks, which would count its divergence twice."""
    seen: set[int] = set()
    for callback in callbacks:
        layers = callback.layers(model)
        own = {id(weight.mean) for layer in layers for weight in layer.perturbed_weights()}
        if own & seen:
            raise MisconfigurationException(
                f"Two Flipout callbacks choose the same weights, the second by targets="
                f"{callback.targets}. Give each of them targets that the others have not."
            )
        seen |= own


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number from 0, got {value}.")
    return value


def _count(name: str, value: int) -> int:
    if value < 0 or value != int(value):
        raise ValueError(
            f"{name} must be a number of networks, 0 for the mean weights, got {value}."
        )
    return value
