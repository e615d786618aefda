"""`Flipout` converts: in every stage, wherever layers are made, beside other callbacks."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_revflip.callbacks import Flipout, ReversibleRNN
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.convert import convert, load_from_checkpoint, recorded_spec
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    DropConnect,
    FlipoutEmbedding,
    FlipoutLinear,
    Gaussian,
    MultiplicativeGaussian,
    PerturbedLayer,
)
from lightning_revflip.reversible import RevLSTM
from lightning_revflip.reversible_flipout import FlipoutRevLSTM
from tests.helpers.flipout import Regressor, explicit_divergence, loader, weights
from tests.helpers.models import LateTagger, SetupTagger, Tagger, quiet_trainer
from tests.helpers.models import loader as token_loader

PARTS = ["embedding", "head"]


class LateRegressor(Regressor):
    """Makes its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Regressor().net


class SetupRegressor(Regressor):
    """Makes its network in its own `setup`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = Regressor().net


@pytest.mark.parametrize("model_class", [Regressor, LateRegressor, SetupRegressor])
def test_layers_are_perturbed_and_optimized_wherever_they_are_made(tmp_path, model_class) -> None:
    model = model_class()
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout()])
    trainer.fit(model, loader())
    assert [type(model.net[i]) for i in (0, 2)] == [FlipoutLinear, FlipoutLinear]
    optimized = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert model.net[0].weight_rho in optimized
    assert optimized == set(model.parameters())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_alone_converts_and_restores(tmp_path, stage: str) -> None:
    model = Regressor()
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout()])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Regressor()
    other = quiet_trainer(tmp_path, callbacks=[Flipout()])
    getattr(other, stage)(fresh, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(weights(fresh), weights(model))


def test_a_checkpoint_loads_without_a_trainer_and_goes_on_in_one(tmp_path) -> None:
    model = Regressor()
    perturbation = Gaussian(init_std=0.2, prior_std=0.5)
    callback = Flipout(perturbation=perturbation, base_perturbations=2)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    loaded = load_from_checkpoint(Regressor, tmp_path / "a.ckpt")
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.net[0].perturbation == perturbation
    assert loaded.net[0].base_perturbations == 2
    quiet_trainer(tmp_path, callbacks=[callback]).fit(loaded, loader())
    assert len(recorded_spec(loaded).conversions) == 2


def test_weights_of_a_plain_checkpoint_become_means(tmp_path) -> None:
    plain = Regressor()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(plain, loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    model = Regressor()
    test = quiet_trainer(tmp_path, callbacks=[Flipout()]).test
    test(model, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert torch.equal(model.net[0].weight, plain.net[0].weight)
    std = nn.functional.softplus(model.net[0].weight_rho)
    torch.testing.assert_close(std, torch.full_like(std, 0.05))
    started = Regressor.load_from_checkpoint(tmp_path / "plain.ckpt")
    quiet_trainer(tmp_path, callbacks=[Flipout()]).fit(started, loader())


def test_fitting_twice_converts_once(tmp_path) -> None:
    model, callback = Regressor(), Flipout()
    quiet_trainer(tmp_path, callbacks=[callback]).fit(model, loader())
    rho = model.net[0].weight_rho
    quiet_trainer(tmp_path, callbacks=[callback]).fit(model, loader())
    assert model.net[0].weight_rho is rho
    assert len(callback.spec.conversions) == 2


def test_a_checkpoint_of_other_settings_warns(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(perturbation=Gaussian(0.1))])
    trainer.fit(Regressor(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = quiet_trainer(tmp_path, callbacks=[Flipout(perturbation=Gaussian(0.2))])
    with pytest.warns(UserWarning, match="written with other settings of Flipout"):
        other.test(Regressor(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


# --- beside other callbacks --------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [Tagger, LateTagger, SetupTagger])
@pytest.mark.parametrize("flipout_first", [True, False], ids=["before", "after"])
def test_reversible_layers_get_perturbed_recurrent_weights(
    tmp_path, model_class, flipout_first: bool
) -> None:
    def callbacks() -> list:
        pair = [Flipout(perturbation=DropConnect()), ReversibleRNN(2.0)]
        return pair if flipout_first else pair[::-1]

    seed_everything(0)
    model = model_class()
    trainer = quiet_trainer(tmp_path, callbacks=callbacks())
    trainer.fit(model, token_loader())
    kinds = [type(part) for part in (model.embedding, model.rnn, model.head)]
    assert kinds == [FlipoutEmbedding, FlipoutRevLSTM, FlipoutLinear]
    assert model.rnn.max_forget_bits == 2.0
    assert "configure_model" not in vars(model)
    assert "setup" not in vars(model)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    fresh = model_class()
    other = quiet_trainer(tmp_path, callbacks=callbacks())
    other.test(fresh, token_loader(), ckpt_path=tmp_path / "both.ckpt", verbose=False)
    assert torch.equal(weights(fresh), weights(model))
    if model_class is not SetupTagger:  # which makes its layers in a Trainer only
        loaded = load_from_checkpoint(model_class, tmp_path / "both.ckpt")
        assert torch.equal(weights(loaded), weights(model))


@pytest.mark.parametrize("flipout_first", [True, False], ids=["before", "after"])
def test_each_callback_keeps_to_its_targets(tmp_path, flipout_first: bool) -> None:
    pair = [Flipout(PARTS), ReversibleRNN()]
    model = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=pair if flipout_first else pair[::-1])
    trainer.fit(model, token_loader())
    kinds = [type(part) for part in (model.embedding, model.rnn, model.head)]
    assert kinds == [FlipoutEmbedding, RevLSTM, FlipoutLinear]


def test_two_callbacks_perturb_different_layers(tmp_path) -> None:
    callbacks = [
        Flipout(["net.0"], Gaussian(prior_std=0.5), kl_weight=0.5),
        Flipout(["net.2"], Gaussian(prior_std=2.0), num_data=16),
    ]
    model = Regressor()
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(model, loader())
    first = explicit_divergence(model.net[0], 0.5)
    second = explicit_divergence(model.net[2], 2.0)
    assert float(trainer.callback_metrics["flipout/kl"]) == pytest.approx(first.item(), rel=1e-5)
    assert float(trainer.callback_metrics["flipout_2/kl"]) == pytest.approx(second.item(), rel=1e-5)
    assert len({callback.state_key for callback in callbacks}) == 2
    layers = [model.net[0], model.net[2]]
    assert [layer.perturbation.prior_std for layer in layers] == [0.5, 2.0]


def test_two_callbacks_on_the_same_weights_are_refused(tmp_path) -> None:
    callbacks = [Flipout(), Flipout(["net.2"])]
    with pytest.raises(MisconfigurationException, match=r"second by targets=\['net.2'\]"):
        quiet_trainer(tmp_path, callbacks=callbacks).fit(Regressor(), loader())


def test_weight_averaging_must_come_after(tmp_path) -> None:
    for averaging in (WeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)):
        trainer = quiet_trainer(tmp_path, callbacks=[averaging, Flipout()])
        message = f"Put Flipout before {type(averaging).__name__}"
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(Regressor(), loader())
    model = Regressor()
    quiet_trainer(tmp_path, callbacks=[Flipout(), WeightAveraging()]).fit(model, loader())
    assert type(model.net[0]) is FlipoutLinear


def test_a_strategy_that_spawns_needs_a_model_that_was_converted_before(tmp_path) -> None:
    model = Tagger()
    convert(model, {nn.Embedding: FlipoutEmbedding})  # not all that the callback would
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(PARTS)], strategy="ddp_spawn", devices=2)
    with pytest.raises(MisconfigurationException, match="Use strategy='ddp', or call .*convert"):
        trainer.callbacks[0].setup(trainer, model, "fit")
    converted = Tagger()
    convert(converted, FLIPOUT_LAYERS, PARTS)
    trainer.callbacks[0].setup(trainer, converted, "fit")


def test_a_strategy_that_shards_is_refused(tmp_path) -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    trainer = quiet_trainer(tmp_path, callbacks=[Flipout()])
    trainer.strategy.__class__ = type("Sharding", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="and Sharding shards them"):
        trainer.callbacks[0].setup(trainer, Regressor(), "fit")


# --- arguments ---------------------------------------------------------------------------------


def test_what_cannot_be_converted_is_reported_before_training(tmp_path) -> None:
    class Convolving(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(3, 3, 1)

    callback = Flipout(estimator="local_reparameterization")
    with pytest.raises(
        ValueError, match="cannot convert 'convolution': FlipoutConv1d has no local"
    ):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(Convolving(), loader())
    callback = Flipout(layer_arguments={"example_dim": 1})
    with pytest.raises(ValueError, match="FlipoutConv1d has no argument example_dim"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(Convolving(), loader())
    callback = Flipout(["decoder"])
    with pytest.raises(ValueError, match="target 'decoder' matches no"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(Regressor(), loader())


def test_arguments_reach_the_layers(tmp_path) -> None:
    callback = Flipout(
        [nn.Linear],
        perturbation=MultiplicativeGaussian(0.3),
        base_perturbations=4,
        layer_arguments={"example_dim": -2},
    )
    model = Regressor()
    quiet_trainer(tmp_path, callbacks=[callback]).validate(model, loader(), verbose=False)
    layer = model.net[2]
    assert (layer.perturbation, layer.base_perturbations) == (MultiplicativeGaussian(0.3), 4)
    assert layer.example_dim == -2


def test_layers_that_the_module_made_keep_their_perturbation_and_count(tmp_path) -> None:
    model = Regressor()
    model.net[2] = FlipoutLinear(8, 1, perturbation=Gaussian(init_std=0.3, prior_std=2.0))
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout()], log_every_n_steps=1)
    trainer.fit(model, loader())
    assert model.net[2].perturbation.prior_std == 2.0
    expected = explicit_divergence(model.net[0], 1.0) + explicit_divergence(model.net[2], 2.0)
    logged = float(trainer.callback_metrics["flipout/kl"])
    assert logged == pytest.approx(expected.item(), rel=1e-5)


def test_the_command_line_makes_perturbations(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["revflip"])
    config = {
        "model": {"class_path": "tests.helpers.flipout.Regressor"},
        "data": {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [
                {
                    "class_path": "lightning_revflip.callbacks.Flipout",
                    "init_args": {
                        "targets": ["net.*"],
                        "perturbation": {
                            "class_path": "lightning_revflip.flipout.Gaussian",
                            "init_args": {"init_std": 0.02, "prior_std": 0.3},
                        },
                        "annealing_epochs": 2,
                        "layer_arguments": {"example_dim": 0},
                    },
                }
            ],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = RevflipCLI([f"--config={path}"], run=False)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, Flipout))
    assert callback.perturbation == Gaussian(init_std=0.02, prior_std=0.3)
    assert callback.annealing_epochs == 2
    cli.trainer.validate(cli.model, loader(), verbose=False)
    assert isinstance(cli.model.net[0], PerturbedLayer)


def test_the_rules_cover_every_flipout_layer() -> None:
    assert FLIPOUT_LAYERS.items() <= Flipout().rules().items()
    assert Flipout().rules()[RevLSTM] is FlipoutRevLSTM
