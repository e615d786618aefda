"""RNGState: a run that was stopped and resumed is the run that was not stopped."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_revflip import _generators
from lightning_revflip._generators import get_generators, seed_generators, set_generators
from lightning_revflip.callbacks.rng_state import RNGState
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from tests.helpers.models import quiet_trainer
from tests.helpers.random_models import NoisyRegressor, flat_weights, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand(), np.random.randn()]


def fit(folder, epochs, *callbacks, model=None, data=None, ckpt=None, seed=0, **settings):
    """Train; a resumed run starts from other random numbers, as it would in a new process."""
    seed_everything(seed)
    model = NoisyRegressor() if model is None else model
    trainer = quiet_trainer(
        folder,
        callbacks=list(callbacks),
        max_epochs=epochs,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **settings,
    )
    data = {"train_dataloaders": loader()} if data is None else data
    trainer.fit(model, **data, ckpt_path=ckpt)
    return trainer, flat_weights(model)


@pytest.mark.parametrize("validates", [False, True], ids=["no_validation", "validation"])
@pytest.mark.parametrize("written", ["after_fit", "by_callback"])
def test_a_run_resumed_at_the_end_of_an_epoch_is_the_uninterrupted_one(
    tmp_path, validates, written
):
    data = {"train_dataloaders": loader()}
    if validates:
        data["val_dataloaders"] = loader(shuffle=False)
    _, whole = fit(tmp_path, 4, data=data)
    if written == "after_fit":
        path = tmp_path / "two.ckpt"
        trainer, _ = fit(tmp_path, 2, RNGState(), data=data)
        trainer.save_checkpoint(path)
    else:
        path = tmp_path / "kept" / "epoch=1-step=12.ckpt"
        fit(tmp_path, 3, RNGState(), ModelCheckpoint(path.parent, save_top_k=-1), data=data)
    _, resumed = fit(tmp_path, 4, RNGState(), data=data, ckpt=path, seed=99)
    assert torch.equal(resumed, whole)
    _, without = fit(tmp_path, 4, data=data, ckpt=path, seed=99)
    assert not torch.equal(without, whole)


class AsksForSteps(NoisyRegressor):
    """Sets up the training data while its optimizer is made."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=steps, cycle_momentum=False
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def test_a_module_that_asks_for_the_number_of_steps_is_resumed_as_well(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1)
    _, whole = fit(tmp_path, 4, RNGState(), keep, model=AsksForSteps())
    path = tmp_path / "kept" / "epoch=1-step=12.ckpt"
    _, resumed = fit(tmp_path, 4, RNGState(), model=AsksForSteps(), ckpt=path, seed=99)
    assert torch.equal(resumed, whole)


def test_a_resumable_loader_goes_on_within_an_epoch(tmp_path):
    def digits(*callbacks, **arguments):
        classifier = Classifier((1, 8, 8), 10, hidden=(16,), optimizer="sgd", lr=0.1)
        classifier.network.insert(2, torch.nn.Dropout(0.5))
        data = HandwrittenDigits(source="digits", batch_size=200)  # six batches
        return fit(
            tmp_path,
            2,
            *callbacks,
            model=classifier,
            data={"datamodule": data},
            limit_val_batches=0,
            **arguments,
        )

    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    _, whole = digits(RNGState(), keep)
    for step, epoch in ((4, 0), (9, 1)):
        path = tmp_path / "kept" / f"epoch={epoch}-step={step}.ckpt"
        _, resumed = digits(RNGState(), ckpt=path, seed=99)
        assert torch.equal(resumed, whole)
        _, resumed = digits(ckpt=path, seed=99)
        assert not torch.equal(resumed, whole)


def test_a_dataloader_shuffles_again_within_an_epoch_the_same_each_time(tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
    model = NoisyRegressor()
    _, whole = fit(tmp_path, 1, RNGState(), keep, model=model)
    path = tmp_path / "kept" / "epoch=0-step=4.ckpt"
    ends, reads = [], []
    for seed in (98, 99):
        resumed = NoisyRegressor()
        with pytest.warns(UserWarning, match="your dataloader is not resumable"):
            ends.append(fit(tmp_path, 1, RNGState(), model=resumed, ckpt=path, seed=seed)[1])
        reads.append(resumed.read)
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], whole)
    assert reads[0] == reads[1]
    assert len(reads[0]) == 2
    assert reads[0] != model.read[4:]


def test_the_checkpoint_is_read_with_weights_only(tmp_path):
    trainer, _ = fit(tmp_path, 1, RNGState())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["RNGState"]
    expected = draws()
    set_generators(saved["processes"][0])
    assert draws() == expected


def test_only_a_resumed_fit_changes_the_generators(tmp_path):
    trainer, _ = fit(tmp_path, 1, RNGState())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    seed_generators(5)
    expected = draws()
    seed_generators(5)
    other = quiet_trainer(tmp_path, callbacks=[RNGState()])
    other.validate(NoisyRegressor(), loader(shuffle=False), ckpt_path=tmp_path / "one.ckpt")
    assert draws()[1:] == expected[1:]  # from torch the loader has drawn
    fit(tmp_path, 1, other.callbacks[0], seed=5)  # nor does the state that was only read
    whole = draws()
    fit(tmp_path, 1, seed=5)
    assert draws() == whole


# --- other processes than before -------------------------------------------------------------


def test_more_processes_warn_and_begin_streams_of_their_own(tmp_path, monkeypatch):
    callback = RNGState()
    state = callback.state_dict()
    drawn = []
    for rank in (0, 1, 2, 2):
        trainer = quiet_trainer(tmp_path)
        monkeypatch.setattr(type(trainer), "world_size", 3)
        monkeypatch.setattr(type(trainer), "global_rank", rank)
        callback.load_state_dict(state)
        with pytest.warns(UserWarning, match="of 1 processes, but now there are 3"):
            callback.on_fit_start(trainer, NoisyRegressor())
        drawn.append(draws())
    set_generators(state["processes"][0])
    assert drawn[0] == draws()
    assert drawn[2] == drawn[3]
    assert len({tuple(each) for each in drawn}) == 3


def test_generators_that_are_new_or_gone_are_named(monkeypatch):
    state = get_generators()
    with_cuda = state | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    assert set_generators(with_cuda) == ["cuda"]
    monkeypatch.setattr(_generators, "_HAS_NUMPY", False)
    assert set_generators(state) == ["numpy"]
    assert "numpy" not in get_generators()
    seed_generators(1)


def test_a_generator_that_cannot_be_restored_is_warned_of(tmp_path):
    callback = RNGState()
    state = get_generators() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    callback.load_state_dict({"processes": [state]})
    with pytest.warns(UserWarning, match="The random numbers of cuda are not those"):
        callback.on_fit_start(quiet_trainer(tmp_path), NoisyRegressor())


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_generators_are_seeded_as_by_seed_everything(seed, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    seed_generators(seed)
    found = draws()
    seed_everything(seed)
    assert draws() == found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_is_resumed_with_the_numbers_of_the_device(tmp_path):
    device = {"accelerator": "gpu", "devices": 1}
    _, whole = fit(tmp_path, 4, **device)
    trainer, _ = fit(tmp_path, 2, RNGState(), **device)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, resumed = fit(tmp_path, 4, RNGState(), ckpt=tmp_path / "two.ckpt", seed=99, **device)
    assert torch.equal(resumed, whole)


@pytest.mark.slow
def test_each_of_two_processes_goes_on_with_its_own_numbers(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.train_rng_state", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for rank in ranks:
        assert torch.equal(rank["resumed"]["weights"], rank["whole"]["weights"])
        assert torch.equal(rank["resumed"]["next"], rank["whole"]["next"])
    first, second = (rank["whole"] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert not (first["next"] == second["next"]).any()
