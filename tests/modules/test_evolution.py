"""EvolutionModule trains by FlipoutES, also over several processes and after a resume."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.optim import SGD, Adam

from lightning_revflip.callbacks import Flipout
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.flipout.evolution import FlipoutES
from lightning_revflip.modules import EvolutionModule
from tests.helpers.models import quiet_trainer
from tests.helpers.train_evolution import SETTINGS, evolution_module, loader, network

ROOT = Path(__file__).parents[2]


def test_each_batch_is_a_generation_of_flipout_es(tmp_path):
    module = evolution_module(examples=3)
    quiet_trainer(tmp_path, max_epochs=2).fit(module, loader())

    model = network()
    es = FlipoutES(model, **SETTINGS)
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(2):
        for batch in loader():
            x, y = es.repeat(batch, 3)
            with es.members():
                losses = F.cross_entropy(model(x), y, reduction="none")
            es.gradient(-losses.view(32, 3).mean(1))
            optimizer.step()
            es.next_generation()
    assert module.evolution.generation == 4
    for mine, expected in zip(module.network.parameters(), model.parameters(), strict=True):
        assert mine.equal(expected)


def test_it_learns_and_logs(tmp_path):
    module = evolution_module(base_perturbations=4)
    trainer = quiet_trainer(tmp_path, max_epochs=40, log_every_n_steps=1)
    trainer.fit(module, loader(), loader())
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.9
    assert metrics["val/loss"] < 0.5
    assert metrics["evolution/fitness_best"] > metrics["evolution/fitness_mean"]
    assert metrics["evolution/gradient_norm"] > 0
    assert metrics["evolution/members_per_second"] > 0
    (results,) = trainer.test(module, loader(), verbose=False)
    assert results["test/accuracy"] > 0.9
    (outputs,) = trainer.predict(module, loader(40))
    assert outputs.shape == (40, 3)


def test_any_loss_of_single_examples_will_do(tmp_path):
    def squared(outputs, targets):
        return (outputs[:, 0] - targets).square()

    module = evolution_module(loss=squared, optimizer=partial(Adam, lr=0.03))
    trainer = quiet_trainer(tmp_path, max_epochs=20)
    before = squared(module.network(loader(40).dataset.tensors[0]), loader().dataset.tensors[1])
    trainer.fit(module, loader(), loader())
    assert trainer.callback_metrics["val/loss"] < 0.7 * before.mean()
    assert "val/accuracy" not in trainer.callback_metrics


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, first, rest = (evolution_module() for _ in range(3))
    quiet_trainer(tmp_path, max_epochs=4).fit(whole, loader())
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.evolution.state_dict() == whole.evolution.state_dict()
    for name, value in whole.state_dict().items():
        assert value.equal(rest.state_dict()[name]), name


def test_a_checkpoint_is_loaded_with_the_settings_it_was_made_with(tmp_path):
    module = evolution_module(examples=3, shaping="standardized", targets=["0"])
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = EvolutionModule.load_from_checkpoint(
        tmp_path / "model.ckpt", network=network(), weights_only=True
    )
    assert loaded.hparams == module.hparams
    assert set(loaded.hparams) & {"network", "loss", "optimizer"} == set()
    assert repr(loaded.evolution) == repr(module.evolution)
    assert loaded.evolution.state_dict() == module.evolution.state_dict()
    assert (loaded.examples, len(loaded.evolution.parameters)) == (3, 2)
    for name, value in module.state_dict().items():
        assert value.equal(loaded.state_dict()[name]), name


class Points(LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_a_checkpoint_of_the_command_line_is_loaded_as_it_is(monkeypatch, tmp_path):
    config = {
        "model": {
            "class_path": "lightning_revflip.modules.EvolutionModule",
            "init_args": {
                "network": {
                    "class_path": "torch.nn.Linear",
                    "init_args": {"in_features": 4, "out_features": 3},
                },
                "population": 32,
                "loss": {
                    "class_path": "torch.nn.CrossEntropyLoss",
                    "init_args": {"reduction": "none", "label_smoothing": 0.1},
                },
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
            },
        },
        "data": {"class_path": f"{__name__}.Points"},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["revflip"])
    RevflipCLI(["fit", "--config=config.yaml"])
    (path,) = tmp_path.glob("checkpoints/*.ckpt")
    loaded = EvolutionModule.load_from_checkpoint(path, weights_only=True)
    assert (loaded.loss.reduction, loaded.loss.label_smoothing) == ("none", 0.1)
    assert loaded.evolution.population.size == 32
    assert loaded.configure_optimizers().defaults["lr"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["module", "callback"])
def test_two_processes_train_as_one(tmp_path, kind):
    command = [sys.executable, "-m", "tests.helpers.train_evolution", str(tmp_path)]
    for processes in (1, 2):
        subprocess.run(
            [*command, str(processes), kind],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=200,
        )
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    start = network().state_dict()
    for name, value in one.items():
        assert not value.equal(start[name])
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-6)


WRONG_SETTINGS = [
    ({"examples": 0}, "examples must be a whole number from 1, or None.*got 0"),
    ({"examples": 2.5}, "examples must be a whole number from 1, or None.*got 2.5"),
    ({"population": 64.0}, "population must be a whole number from 1, got 64.0"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"targets": "0"}, "targets must be a list of patterns or types, got '0'"),
    ({"loss": "ce"}, "loss must be a function of outputs and targets.*got 'ce'"),
    ({"loss": nn.CrossEntropyLoss()}, "reduction='mean'.*CrossEntropyLoss.reduction='none'"),
]


def test_layers_that_a_callback_converts_are_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout()])
    with pytest.raises(ValueError, match=r"cannot differ in the parameters of 0 \(FlipoutLinear\)"):
        trainer.fit(evolution_module(), loader())


def test_bad_input_is_refused(tmp_path):
    for settings, message in WRONG_SETTINGS:
        with pytest.raises(ValueError, match=message):
            evolution_module(**settings)
    with pytest.raises(ValueError, match="LayerNorm"):
        EvolutionModule(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    module = evolution_module(loss=F.cross_entropy)
    with pytest.raises(ValueError, match="reduction='none'"):
        quiet_trainer(tmp_path).fit(module, loader())
    trainer = quiet_trainer(tmp_path)
    trainer.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        trainer.fit(evolution_module(), loader())
