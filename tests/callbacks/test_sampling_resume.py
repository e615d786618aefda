"""SGLDSampler: a run that was stopped or killed goes on as the run that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revflip.callbacks import RNGState, SGLDSampler
from lightning_revflip.posterior import SampleBank
from lightning_revflip.sgld import CyclicalSchedule
from tests.helpers.models import quiet_trainer
from tests.helpers.sampled_models import blobs, fit, loader, sampler, sgd, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]

ROOT = Path(__file__).parents[2]


def assert_same_bank(found: Path, expected: Path) -> None:
    one, other = SampleBank(found / "bank"), SampleBank(expected / "bank")
    assert one.steps == other.steps
    assert torch.equal(one.rows(), other.rows())
    buffers = other.buffers()
    assert one.buffers().keys() == buffers.keys()
    assert all(torch.equal(one.buffers()[name], buffers[name]) for name in buffers)


def run(folder, epochs, ckpt=None, *layers, **changes):
    """With data that are shuffled, and dropout, so that everything depends on the generators."""
    model = blobs(sgd, nn.Dropout(0.3), *layers)
    return fit(
        folder,
        sampler(folder, **changes),
        RNGState(),
        model=model,
        epochs=epochs,
        shuffle=True,
        validate=True,
        ckpt=ckpt,
    )


VARIANTS = {
    "sgld": {},
    "psgld": {"sampler": "psgld"},
    "sghmc": {"sampler": "sghmc"},
    "spread": {"max_samples": 3},
    "reservoir": {"max_samples": 3, "policy": "reservoir"},
    "latest": {"max_samples": 3, "policy": "latest"},
    "cyclical": {"schedule": lambda o: CyclicalSchedule(o, 8, 0.5), "burn_in": 0},
    "chains": {"chains": 2, "network": "net"},
    "global_seed": {"seed": None},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, changes):
    whole, _ = run(tmp_path / "whole", 4, **changes)
    _, trainer = run(tmp_path / "resumed", 2, **changes)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = run(tmp_path / "resumed", 4, tmp_path / "two.ckpt", **changes)
    assert torch.equal(weights(resumed), weights(whole))
    assert_same_bank(tmp_path / "resumed", tmp_path / "whole")


def test_buffers_of_samples_are_resumed_as_well(tmp_path):
    run(tmp_path / "whole", 4, None, nn.BatchNorm1d(8))
    _, trainer = run(tmp_path / "resumed", 2, None, nn.BatchNorm1d(8))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    run(tmp_path / "resumed", 4, tmp_path / "two.ckpt", nn.BatchNorm1d(8))
    assert_same_bank(tmp_path / "resumed", tmp_path / "whole")


def test_samples_after_the_checkpoint_are_dropped(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    callbacks = [sampler(tmp_path), RNGState(), keep]
    fit(tmp_path, *callbacks, epochs=4, enable_checkpointing=True, shuffle=True)
    whole = SampleBank(tmp_path / "bank")
    rows, steps = whole.rows(), whole.steps
    again = [sampler(tmp_path), RNGState()]
    ckpt = tmp_path / "kept" / "epoch=1.ckpt"
    fit(tmp_path, *again, epochs=3, ckpt=ckpt, shuffle=True)
    bank = SampleBank(tmp_path / "bank")
    assert bank.steps[0] == [step for step in steps[0] if step <= 18]
    assert torch.equal(bank.rows(), rows[: len(bank)])


def test_a_checkpoint_has_all_samples_that_it_counts_on_the_disk(tmp_path):
    """Else a run that is killed later could not resume."""
    counts = []

    class Count(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            saved = torch.load(filepath, weights_only=True)["callbacks"]["SGLDSampler"]
            counts.append((saved["seen"], len(SampleBank(tmp_path / "bank"))))

    keep = Count(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, sampler(tmp_path), keep, epochs=2, enable_checkpointing=True)
    assert counts == [([0], 0), ([1], 1), ([2], 2), ([4], 4)]


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_killed_run_resumes_as_if_it_had_not_been(tmp_path, epochs):
    command = [sys.executable, "-m", "tests.helpers.train_sampler", "endless", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.strip() == str(epochs):
                break
        process.send_signal(signal.SIGKILL)
    bank = SampleBank(tmp_path / "bank")
    bank.verify()
    ckpt = tmp_path / "kept" / f"epoch={epochs - 1}.ckpt"

    def callbacks(folder):
        return sampler(folder, max_samples=8), RNGState()

    resumed, _ = fit(tmp_path, *callbacks(tmp_path), epochs=6, ckpt=ckpt, shuffle=True)
    whole, _ = fit(tmp_path / "whole", *callbacks(tmp_path / "whole"), epochs=6, shuffle=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert_same_bank(tmp_path, tmp_path / "whole")


def test_the_same_trainer_goes_on(tmp_path):
    callback = sampler(tmp_path)
    model, trainer = fit(tmp_path, callback)
    trainer.fit_loop.max_epochs = 4
    first = trainer.optimizers[0].generator.initial_seed()
    trainer.fit(model, loader())
    assert callback.steps == 24
    assert SampleBank(tmp_path / "bank").steps == {0: list(range(6, 25, 2))}
    assert trainer.optimizers[0].generator.initial_seed() != first  # else it had the same noise


# --- what does not fit together --------------------------------------------------------------


def checkpoint(folder, *callbacks, **settings):
    _, trainer = fit(folder, *callbacks, **settings)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.filterwarnings("ignore:.*differs from the 24 items")
@pytest.mark.parametrize(
    ("name", "value", "saved"),
    [("temperature", 0.5, 1.0), ("num_data", 30, 24), ("prior_precision", 2.0, 0)],
)
def test_another_target_than_that_of_the_checkpoint_is_refused(tmp_path, name, value, saved):
    ckpt = checkpoint(tmp_path, sampler(tmp_path))
    message = f"has {name}={value}, and the SGLD of the checkpoint has {name}={saved}"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, sampler(tmp_path, **{name: value}), ckpt=ckpt, epochs=4)


def test_a_checkpoint_without_the_sampler_names_the_way_out(tmp_path):
    ckpt = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="this is not the state of SGLD.*load these alone"):
        fit(tmp_path, sampler(tmp_path), ckpt=ckpt, epochs=4)


def test_a_checkpoint_without_its_bank_is_refused(tmp_path):
    ckpt = checkpoint(tmp_path, sampler(tmp_path))
    callback = sampler(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot rewind .* to 4 samples: 0 have been offered"):
        fit(tmp_path, callback, ckpt=ckpt, epochs=4)


def test_other_settings_of_the_bank_are_refused(tmp_path):
    ckpt = checkpoint(tmp_path, sampler(tmp_path))
    with pytest.raises(ValueError, match="max_samples"):
        fit(tmp_path, sampler(tmp_path, max_samples=3), ckpt=ckpt, epochs=4)


# --- evaluation of a checkpoint --------------------------------------------------------------


def test_a_checkpoint_alone_finds_its_bank(tmp_path):
    """Without `dirpath` the bank stands beside the checkpoints of its run."""
    callback = SGLDSampler(num_data=24, burn_in=4, every_n_steps=2, seed=7)
    logger = CSVLogger(tmp_path, "runs")
    model, trainer = fit(tmp_path, callback, validate=True, logger=logger)
    assert callback.folder == tmp_path / "runs" / "version_0" / "posterior"
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (expected,) = trainer.test(model, loader(12), verbose=False)

    logger = CSVLogger(tmp_path, "runs")
    other = SGLDSampler(num_data=24)
    trainer = quiet_trainer(tmp_path, callbacks=[other], logger=logger)
    ckpt = tmp_path / "end.ckpt"
    (found,) = trainer.test(blobs(seed=1), loader(12), ckpt_path=ckpt, verbose=False)
    assert found == expected
    predicted = torch.cat(trainer.predict(blobs(seed=1), loader(12), ckpt_path=ckpt))
    probabilities = SampleBank(callback.folder).predict(model, loader(12).dataset[:][0])
    torch.testing.assert_close(predicted, probabilities.mean(0))


def test_chains_of_a_checkpoint_are_tested(tmp_path):
    changes = {"chains": 2, "network": "net"}
    model, trainer = fit(tmp_path, sampler(tmp_path, **changes))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (expected,) = trainer.test(model, loader(12), verbose=False)
    trainer = quiet_trainer(tmp_path, callbacks=[sampler(tmp_path, **changes)])
    ckpt = tmp_path / "end.ckpt"
    (found,) = trainer.test(blobs(seed=1), loader(12), ckpt_path=ckpt, verbose=False)
    assert found == expected
