"""EvolutionModule trains by FlipoutES, also over several processes and after a resume."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Adam

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


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="examples must be at least 1"):
        evolution_module(examples=0)
    with pytest.raises(ValueError, match="LayerNorm"):
        EvolutionModule(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    module = evolution_module(loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="reduction='none'"):
        quiet_trainer(tmp_path).fit(module, loader())
    trainer = quiet_trainer(tmp_path)
    trainer.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        trainer.fit(evolution_module(), loader())
