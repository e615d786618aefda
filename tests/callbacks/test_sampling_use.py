"""SGLDSampler together with what else a Trainer may have, and from a configuration file."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revflip.callbacks import ReversibleRNN, SGLDSampler
from lightning_revflip.posterior import SampleBank
from lightning_revflip.sgld import CyclicalSchedule, log_mean_softmax
from tests.helpers.models import Tagger, quiet_trainer
from tests.helpers.models import loader as token_loader
from tests.helpers.sampled_models import Blobs, blobs, fit, loader, sampler, sgd, weights

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")

STEPS = {0: [6, 8, 10, 12]}


def test_mixed_precision(tmp_path):
    model, trainer = fit(tmp_path, sampler(tmp_path), validate=True, precision="bf16-mixed")
    bank = SampleBank(tmp_path / "bank")
    assert bank.steps == STEPS
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x, y = loader(12).dataset[:]
    nll = F.nll_loss(bank.predict(model, x).mean(0).log(), y).item()
    # bfloat16 has 8 bits.
    assert float(trainer.callback_metrics["val_nll"]) == pytest.approx(nll, rel=0.02)


def test_double_precision(tmp_path):
    fit(tmp_path, sampler(tmp_path), validate=True, precision="64-true")
    assert SampleBank(tmp_path / "bank").steps == STEPS


def test_checkpoints_early_stopping_and_monitors(tmp_path):
    best = ModelCheckpoint(tmp_path / "kept", monitor="sgld/entropy")
    stop = EarlyStopping("val_nll", patience=0, min_delta=100.0)
    callbacks = [sampler(tmp_path), best, stop, LearningRateMonitor("step")]
    logger = CSVLogger(tmp_path, "runs")
    _, trainer = fit(
        tmp_path,
        *callbacks,
        epochs=9,
        validate=True,
        enable_checkpointing=True,
        logger=logger,
        log_every_n_steps=1,
    )
    assert trainer.current_epoch < 9
    assert best.best_model_path
    assert "lr-SGLD" in (tmp_path / "runs" / "version_0" / "metrics.csv").read_text()


def test_averaged_weights_do_not_touch_the_samples(tmp_path):
    plain, _ = fit(tmp_path / "plain", sampler(tmp_path / "plain"), validate=True)
    averaged, _ = fit(tmp_path, sampler(tmp_path), EMAWeightAveraging(decay=0.5), validate=True)
    rows = [SampleBank(folder / "bank").rows() for folder in (tmp_path, tmp_path / "plain")]
    assert torch.equal(*rows)
    assert not torch.equal(weights(averaged), weights(plain))  # Lightning's, at the end


def test_parallel_chains_may_be_averaged_afterwards(tmp_path):
    callbacks = [sampler(tmp_path, network="net", chains=2), EMAWeightAveraging(decay=0.5)]
    fit(tmp_path, *callbacks, validate=True)
    assert SampleBank(tmp_path / "bank").chains == (0, 1)


class Tunable(Blobs):
    def __init__(self):
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=module.lr))
        self.lr = 0.123


def test_the_learning_rate_finder_leaves_no_samples(tmp_path):
    torch.manual_seed(0)
    model = Tunable()
    finder = LearningRateFinder(num_training_steps=20)
    callback = sampler(tmp_path)
    _, trainer = fit(tmp_path, callback, finder, model=model, epochs=8)
    assert model.lr != 0.123
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr
    assert callback.steps == 48
    assert SampleBank(tmp_path / "bank").steps == {0: list(range(6, 49, 2))}


class PlainTagger(Tagger):
    """Trains with plain SGD, and calls itself in its steps."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_recurrent_networks_ordinary_and_reversible(tmp_path, first):
    seed_everything(0)
    callback = sampler(tmp_path, num_data=16)
    callbacks = [callback, ReversibleRNN()] if first else [ReversibleRNN(), callback]
    model = PlainTagger()
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    trainer.fit(model, token_loader(), token_loader())
    bank = SampleBank(tmp_path / "bank")
    assert bank.steps == STEPS
    assert bank.layout.names == tuple(name for name, _ in PlainTagger().named_parameters())
    tokens = next(iter(token_loader(16)))
    probabilities = bank.predict(model, tokens[:, :-1]).mean(0)
    nll = F.nll_loss(probabilities.log().flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(nll, rel=1e-3)


class Late(Blobs):
    """Makes its layers in `configure_model`."""

    def __init__(self):
        super().__init__(sgd)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("chains", [1, 2])
def test_layers_may_be_made_in_configure_model(tmp_path, chains):
    fit(tmp_path, sampler(tmp_path, network="net", chains=chains), model=Late())
    bank = SampleBank(tmp_path / "bank")
    assert len(bank.chains) == chains
    assert bank.predict(blobs(), loader().dataset[:][0]).shape == (4 * chains, 24, 3)


# --- from a configuration --------------------------------------------------------------------


class BlobData(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(12)


class BlobsFromFile(Blobs):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=lr))


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_revflip.callbacks.SGLDSampler
      init_args:
        dirpath: {folder}
        num_data: auto
        burn_in: 0
        every_n_steps: 1
        sampler: sghmc
        sampler_options: {{friction: 0.5}}
        schedule:
          class_path: lightning_revflip.sgld.CyclicalSchedule
          init_args:
            cycle_steps: 6
            exploration: 0.5
"""


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter", "ignore:.*jsonargparse")
def test_all_settings_can_stand_in_a_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path / "bank"))
    cli = LightningCLI(
        BlobsFromFile,
        BlobData,
        args=["fit", f"--config={config}"],
        save_config_callback=None,
    )
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, SGLDSampler))
    assert callback.combine is log_mean_softmax
    scheduler = cli.trainer.lr_scheduler_configs[0]
    assert isinstance(scheduler.scheduler, CyclicalSchedule)
    assert scheduler.interval == "step"
    group = cli.trainer.optimizers[0].param_groups[0]
    assert (group["num_data"], group["friction"]) == (24, 0.5)
    assert SampleBank(tmp_path / "bank").steps == {0: [4, 5, 6, 10, 11, 12]}
