"""The rows of the compatibility matrix: each callback with a small model, and what it promises.

Whatever else a Trainer does, `Subject.promise` must hold after training; the tests of an axis add
what that axis promises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revflip import kl
from lightning_revflip.apd import DistilledPosterior
from lightning_revflip.callbacks import (
    DistillationReport,
    EvolutionStrategies,
    Flipout,
    MemoryMonitor,
    PosteriorDistillation,
    ReversibleRNN,
    RNGState,
    SGLDSampler,
)
from lightning_revflip.flipout import PerturbedLayer
from lightning_revflip.modules import APDModule, EvolutionModule
from lightning_revflip.posterior import SampleBank
from lightning_revflip.reversible import RevGRU, memory_report
from tests.helpers.compatibility_models import (
    EXAMPLES,
    Data,
    Sequences,
    codes,
    distilling,
    evolving,
)
from tests.helpers.distilled import network
from tests.helpers.models import quiet_trainer

SEED = 5
EPOCHS = 2
STEPS = 8
"""Optimizer steps of a usual run."""
BURN_IN = 2


class Watch(Callback):
    """Sees whether training began, the weights at its start, and what each optimizer step does."""

    def __init__(self) -> None:
        self.batches = 0
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        """As the optimizer got them."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = [weights(pl_module)]
        self._steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.weights.append(weights(pl_module))
            gradients = [each.grad for each in pl_module.parameters() if each.grad is not None]
            self.gradients.append(nn.utils.parameters_to_vector(gradients).clone())


@dataclass
class Run:
    """A training, before and after."""

    folder: Path
    model: LightningModule
    trainer: Trainer
    data: LightningDataModule
    callbacks: list[Callback]
    """Of the package."""
    watch: Watch = field(default_factory=Watch)

    def callback(self, kind: type[Any]) -> Any:
        """The one of this kind."""
        (found,) = (each for each in self.callbacks if isinstance(each, kind))
        return found

    def fit(self, **arguments: Any) -> Run:
        self.trainer.fit(self.model, datamodule=self.data, **arguments)
        # No method stays replaced; Lightning's DDP puts back that of the class.
        for name, value in vars(self.model).items():
            own = getattr(type(self.model), name, None)
            assert not inspect.isfunction(own) or value.__func__ is own, name
        return self


@dataclass(frozen=True)
class Subject:
    """What a user adds to a Trainer, and where it is tried."""

    name: str
    callbacks: Callable[[], list[Callback]]
    promise: Callable[[Run], None]
    model: Callable[[Path], LightningModule] = lambda folder: Sequences()
    data: Callable[[Path], LightningDataModule] = lambda folder: Data()
    monitor: str = "val_loss"
    """A value of validation."""

    def run(
        self,
        folder: Path,
        *others: Callback,
        before: Sequence[Callback] = (),
        model: LightningModule | None = None,
        data: LightningDataModule | None = None,
        seed: int = SEED,
        beside: Subject | None = None,
        **settings: Any,
    ) -> Run:
        """A Trainer with the callbacks of the package between `before` and `others`."""
        seed_everything(seed)
        owner = beside if beside is not None and beside.data is codes else self
        model = owner.model(folder) if model is None else model
        data = owner.data(folder) if data is None else data
        callbacks = self.callbacks() if beside is None else pair(self, beside)
        watch = Watch()
        usual = {"max_epochs": EPOCHS, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        trainer = quiet_trainer(
            folder, callbacks=[*before, *callbacks, *others, watch], **usual | settings
        )
        return Run(folder, model, trainer, data, callbacks, watch)


def mixed_16() -> dict[str, Any]:
    """Settings for float16 with a scaler; on a CPU a Trainer alone would take bfloat16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def precision(name: str) -> dict[str, Any]:
    """Settings of a Trainer."""
    return mixed_16() if name == "16-mixed" else {"precision": name}


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def bank_of(run: Run) -> SampleBank:
    return SampleBank(run.callback(SGLDSampler).folder)


def has_trained(run: Run) -> None:
    """All parameters are finite, and training has moved them."""
    assert run.trainer.global_step > 0
    assert weights(run.model).isfinite().all()
    assert not torch.equal(weights(run.model), run.watch.weights[0])


# --- what trainings are compared by ------------------------------------------------------------


def saved(run: Run) -> str:
    path = str(run.folder / "end.ckpt")
    run.trainer.save_checkpoint(path)
    return path


def evaluate(run: Run, stage: str, checkpoint: str | None = None) -> dict[str, float]:
    method = getattr(run.trainer, stage)
    (found,) = method(run.model, datamodule=run.data, ckpt_path=checkpoint, verbose=False)
    return dict(found)


def results(run: Run) -> list[torch.Tensor]:
    """What a training has left behind."""
    found = [weights(run.model)]
    kinds = {type(callback) for callback in run.callbacks}
    if SGLDSampler in kinds:
        found.append(bank_of(run).rows())
    if PosteriorDistillation in kinds:
        posterior = DistilledPosterior.load(bank_of(run).path.with_name("distilled"))
        samples = posterior.sample(3, torch.Generator().manual_seed(0))
        found += list(samples.values())
    return found


# --- what each callback promises ----------------------------------------------------------------


def reverses(run: Run) -> None:
    has_trained(run)
    assert isinstance(run.model.rnn, RevGRU)
    x = torch.ones(1, 5, 3, dtype=run.model.head.weight.dtype)
    run.model.train()(x).sum().backward()
    assert memory_report(run.model).stored_bits > 0


def perturbs(run: Run) -> None:
    has_trained(run)
    layers = [run.model.rnn, run.model.head]
    assert all(isinstance(layer, PerturbedLayer) for layer in layers)
    averaged = not torch.equal(weights(run.model), run.watch.weights[-1])
    if not (averaged or run.trainer.barebones):
        logged = run.trainer.callback_metrics["flipout/kl"]
        torch.testing.assert_close(
            logged.double(), kl(run.model).double().detach(), rtol=1e-3, atol=0
        )


def evolves(run: Run) -> None:
    has_trained(run)
    evolution = run.callback(EvolutionStrategies).evolution
    assert evolution.state_dict()["generation"] == run.watch.batches


def samples(run: Run) -> None:
    has_trained(run)
    bank = bank_of(run)
    assert bank.steps == {0: list(range(BURN_IN + 1, run.trainer.global_step + 1))}
    expected = run.watch.weights[BURN_IN + 1 :]
    assert torch.equal(bank.rows(), torch.stack(expected).float())


def distils(run: Run) -> None:
    samples(run)
    posterior = DistilledPosterior.load(bank_of(run).path.with_name("distilled"))
    posterior.layout.check_module(run.model)
    assert all(each.isfinite().all() for each in posterior.sample(3).values())


def reports(run: Run) -> None:
    generates(run)
    if not run.trainer.barebones:
        assert 0 <= float(run.trainer.callback_metrics["apd/accuracy"]) <= 1


def monitors(run: Run) -> None:
    has_trained(run)
    if not run.trainer.barebones:
        saved = run.trainer.callback_metrics["memory/saved_for_backward_bytes"] > 0
        assert saved != isinstance(run.model, EvolutionModule)  # has no backward pass


def keeps_random_numbers(run: Run) -> None:
    has_trained(run)
    states = run.callback(RNGState).state_dict()["processes"]
    assert torch.equal(states[run.trainer.global_rank]["torch"], torch.get_rng_state())


def generates(run: Run) -> None:
    has_trained(run)
    assert run.model.posterior().sample(2)["weight"].isfinite().all()


def evolves_itself(run: Run) -> None:
    has_trained(run)
    assert run.model.evolution.state_dict()["generation"] == run.watch.batches


def pair(first: Subject, second: Subject) -> list[Callback]:
    """The callbacks of both; with one `SGLDSampler`, where its author needs it."""
    # The last callback of a subject is its own, the others are what it needs.
    needs, own = [], []
    for subject in (first, second):
        callbacks = subject.callbacks()
        needs += callbacks[:-1]
        own += callbacks[-1:]
    kinds = {type(each) for each in own}
    return [each for each in needs[:1] if type(each) not in kinds] + own


# --- the rows of the matrix ---------------------------------------------------------------------


def sampler(**changes: Any) -> SGLDSampler:
    """Collects every step after the burn-in, unrounded."""
    usual = {"num_data": EXAMPLES, "burn_in": BURN_IN, "every_n_steps": 1, "dtype": "float32"}
    return SGLDSampler(**usual | {"max_samples": None, "seed": 7, **changes})


def distillation() -> list[Callback]:
    few = {"rank": 1, "buffer_size": 3, "every_n_samples": 1, "steps": 2, "batch_size": 4}
    module = APDModule(hidden=(8,))
    return [sampler(), PosteriorDistillation(**few, module=module)]


def report() -> DistillationReport:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    return DistillationReport(network(), data, num_networks=3)


def evolution() -> EvolutionStrategies:
    return EvolutionStrategies(sigma=0.1, population=8)


_APD: dict[str, Any] = {
    "model": distilling,
    "data": codes,
    "monitor": "apd/sliced_wasserstein",
}

SUBJECTS = {
    each.name: each
    for each in (
        Subject("ReversibleRNN", lambda: [ReversibleRNN()], reverses),
        Subject("Flipout", lambda: [Flipout()], perturbs),
        Subject("EvolutionStrategies", lambda: [evolution()], evolves),
        Subject("SGLDSampler", lambda: [sampler()], samples),
        Subject("PosteriorDistillation", distillation, distils),
        Subject("DistillationReport", lambda: [report()], reports, **_APD),
        Subject("MemoryMonitor", lambda: [MemoryMonitor()], monitors),
        Subject(
            "RNGState",
            lambda: [RNGState()],
            keeps_random_numbers,
            model=lambda folder: Sequences(dropout=0.3),
            data=lambda folder: Data(shuffle=True),
        ),
        Subject("APDModule", list, generates, **_APD),
        Subject("EvolutionModule", list, evolves_itself, model=evolving, monitor="val/loss"),
    )
}
