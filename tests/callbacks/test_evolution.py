"""EvolutionStrategies replaces the gradients of an ordinary module, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import nn
from torch.optim import SGD

from lightning_revflip.callbacks import EvolutionStrategies
from lightning_revflip.flipout.evolution import FlipoutES
from tests.helpers.models import quiet_trainer
from tests.helpers.train_evolution import SETTINGS, Classifier, WithLosses, loader, network

LOSS = nn.CrossEntropyLoss(reduction="none")


def by_hand(epochs: int, clip: float | None = None, accumulate: int = 1) -> nn.Module:
    """The same training in plain torch."""
    model = network()
    es = FlipoutES(model, **SETTINGS)
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step, batch in enumerate(batch for _ in range(epochs) for batch in loader()):
        x, y = es.repeat(batch, 4)
        with es.members():
            losses = F.cross_entropy(model(x), y, reduction="none")
        es.gradient(-losses.view(32, 4).mean(1), accumulate=True, scale=1 / accumulate)
        es.next_generation()
        if (step + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", ["per_example_loss", "loss"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_that_of_flipout_es(tmp_path, kind, accumulate, clip):
    model = WithLosses() if kind == "per_example_loss" else Classifier()
    loss = None if kind == "per_example_loss" else LOSS
    evolution = EvolutionStrategies(**SETTINGS, examples=4, loss=loss)
    quiet_trainer(
        tmp_path,
        callbacks=[evolution],
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    ).fit(model, loader())
    expected = by_hand(3, clip, accumulate)
    for mine, other in zip(model.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_it_learns_and_logs_and_leaves_the_module_as_it_was(tmp_path):
    model = WithLosses()
    callback = EvolutionStrategies(**{**SETTINGS, "base_perturbations": 4})
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=40, log_every_n_steps=1)
    trainer.fit(model, loader(), loader())
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.9
    assert metrics["train/loss"] < 0.5
    assert metrics["evolution/fitness_best"] > metrics["evolution/fitness_mean"]
    assert metrics["evolution/gradient_norm"] > 0
    assert metrics["evolution/members_per_second"] > 0
    assert "backward" not in vars(model)


def test_the_loss_of_the_module_has_no_part_in_the_gradient(tmp_path):
    class Wrong(WithLosses):
        def training_step(self, batch, batch_idx):
            return -1000 * super().training_step(batch, batch_idx)

    model = Wrong()
    quiet_trainer(
        tmp_path, callbacks=[EvolutionStrategies(**SETTINGS, examples=4)], max_epochs=3
    ).fit(model, loader())
    expected = by_hand(3)
    for mine, other in zip(model.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_layers_of_configure_model_and_bfloat16_are_trained(tmp_path):
    class Late(WithLosses):
        def __init__(self):
            super().__init__()
            self.network = None

        def configure_model(self):
            if self.network is None:
                self.network = network()

    model = Late()
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[EvolutionStrategies(**SETTINGS)],
        max_epochs=1,
        precision="bf16-mixed",
    )
    trainer.fit(model, loader())
    assert not model.network[0].weight.equal(network()[0].weight)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    def run(model, epochs, ckpt_path=None):
        callback = EvolutionStrategies(**SETTINGS)
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=epochs)
        trainer.fit(model, loader(), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    whole, first, rest = (WithLosses() for _ in range(3))
    run(whole, 4)
    run(first, 2).save_checkpoint(tmp_path / "half.ckpt")
    run(rest, 4, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert value.equal(rest.state_dict()[name]), name


def test_the_module_is_restored_after_an_error(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stopped")

    model = WithLosses()
    trainer = quiet_trainer(tmp_path, callbacks=[EvolutionStrategies(**SETTINGS), Stop()])
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(model, loader())
    assert "backward" not in vars(model)


class Manual(WithLosses):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class MeanLoss(Classifier):
    def per_example_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class Normalised(WithLosses):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Manual, MisconfigurationException, "optimizes manually"),
        (Classifier, MisconfigurationException, "method per_example_loss"),
        (MeanLoss, ValueError, "reduction='none'"),
        (Normalised, ValueError, "norm \\(LayerNorm\\)"),
    ],
)
def test_modules_that_do_not_fit_are_refused(tmp_path, model, error, message):
    trainer = quiet_trainer(tmp_path, callbacks=[EvolutionStrategies(**SETTINGS)])
    with pytest.raises(error, match=message):
        trainer.fit(model(), loader())


WRONG_SETTINGS = [
    ({"sigma": 0.0}, "sigma must be a positive"),
    ({"examples": 0}, "examples must be a whole number from 1, or None.*got 0"),
    ({"examples": 2.5}, "examples must be a whole number from 1, or None.*got 2.5"),
    ({"population": 64.0}, "population must be a whole number from 1, got 64.0"),
    ({"base_perturbations": 0}, "base_perturbations must be a whole number from 1"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"targets": "network.0"}, "targets must be a list of patterns or types, got 'network.0'"),
    ({"loss": "ce"}, "loss must be a function of outputs and targets.*got 'ce'"),
    ({"loss": nn.CrossEntropyLoss()}, "reduction='mean'.*CrossEntropyLoss.reduction='none'"),
]


def test_a_second_one_is_refused(tmp_path):
    both = [EvolutionStrategies(**SETTINGS, targets=[name]) for name in ("*.0", "*.2")]
    trainer = quiet_trainer(tmp_path, callbacks=both)
    with pytest.raises(MisconfigurationException, match="more than one EvolutionStrategies"):
        trainer.fit(WithLosses(), loader())


@pytest.mark.parametrize("finder", [LearningRateFinder(), BatchSizeFinder()])
def test_callbacks_that_would_try_backward_passes_are_refused(tmp_path, finder):
    trainer = quiet_trainer(tmp_path, callbacks=[EvolutionStrategies(**SETTINGS), finder])
    with pytest.raises(MisconfigurationException, match="for training by backpropagation"):
        trainer.fit(WithLosses(), Digits())


class Digits(LightningDataModule):
    batch_size = 20

    def train_dataloader(self):
        return loader(self.batch_size)


@pytest.mark.parametrize("path", ["network", "network.2"])
def test_compiled_layers_are_refused_if_members_differ_in_them(tmp_path, path):
    model = WithLosses()
    model.get_submodule(path).compile(backend="eager")
    with pytest.raises(ValueError, match=f"{path} is compiled, and members compute"):
        quiet_trainer(tmp_path, callbacks=[EvolutionStrategies(**SETTINGS)]).fit(model, loader())
    callback = EvolutionStrategies(**SETTINGS, targets=["*.0"])
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=0).fit(model, loader())


def test_bad_settings_are_refused(tmp_path):
    for settings, message in WRONG_SETTINGS:
        with pytest.raises(ValueError, match=message):
            EvolutionStrategies(**{**SETTINGS, **settings})
    trainer = quiet_trainer(tmp_path, callbacks=[EvolutionStrategies(**SETTINGS)])
    trainer.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        trainer.fit(WithLosses(), loader())
    trainer = quiet_trainer(tmp_path, callbacks=[EvolutionStrategies(0.1, population=7)])
    with pytest.raises(ValueError, match="antithetic pairs"):
        trainer.fit(WithLosses(), loader())
