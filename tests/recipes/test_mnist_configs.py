"""Every combination of the MNIST configurations can be composed, made and run."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger

import recipes
from lightning_revflip.callbacks import EvolutionStrategies, Flipout
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.flipout import Gaussian, MultiplicativeGaussian

CONFIGS = Path(recipes.__path__[0]) / "mnist" / "configs"

NETWORKS = {
    "mlp": ("mlp", [100]),
    "mlp_large": ("mlp", [400, 400]),
    "cnn": ("cnn", [1024]),
}
OPTIMIZERS = {None: ("adam", 1e-3, 0.0), "sgd": ("sgd", 0.1, 0.9)}
OTHERS = {"base", "small", "csv", "batch_8192", "es"}
FLIPOUT = {
    "flipout_bayes": ("flipout", Gaussian(init_std=0.05, prior_std=1.0)),
    "flipout_multiplicative": ("flipout", MultiplicativeGaussian(1.0)),
    "flipout_multiplicative_shared": ("shared", MultiplicativeGaussian(1.0)),
}


def config_args(*names: str) -> list[str]:
    return [f"--config={CONFIGS / name}.yaml" for name in names]


@pytest.fixture(scope="module")
def compose():
    """Composes configurations and makes what they name: model, data, callbacks, logger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["revflip"])
        cli = RevflipCLI(config_args("base", "csv"), run=False)

        def make(*names: str) -> SimpleNamespace:
            made = cli.parser.instantiate_classes(cli.parser.parse_args(config_args(*names)))
            return SimpleNamespace(model=made.model, data=made.data, trainer=made.trainer)

        yield make


@pytest.mark.parametrize(
    ("network", "optimizer", "small"), [*product(NETWORKS, OPTIMIZERS, [False, True])]
)
def test_every_choice_of_network_optimizer_and_data_can_be_composed(
    compose, network, optimizer, small
):
    names = [network, *([optimizer] if optimizer else []), *(["small"] if small else [])]
    run = compose("base", *names, "csv")
    model = run.model
    assert (model.network_name, list(model.hidden)) == NETWORKS[network]
    assert (model.optimizer_name, model.lr, model.momentum) == OPTIMIZERS[optimizer]
    found = run.data.source, run.data.batch_size, run.trainer.max_epochs
    assert found == (("digits", 32, 50) if small else ("auto", 128, 20))
    assert {type(callback) for callback in run.trainer.callbacks} == {
        RichProgressBar,
        ModelCheckpoint,
    }


def test_no_configuration_is_left_out_of_the_tests():
    optimizers = {name for name in OPTIMIZERS if name}
    assert {path.stem for path in CONFIGS.iterdir()} == {
        *OTHERS,
        *NETWORKS,
        *FLIPOUT,
        *optimizers,
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", FLIPOUT)
def test_every_network_can_be_perturbed(compose, network, name):
    run = compose("base", network, name, "batch_8192", "csv")
    (callback,) = (each for each in run.trainer.callbacks if isinstance(each, Flipout))
    assert (callback.estimator, callback.perturbation) == FLIPOUT[name]
    assert (run.data.batch_size, run.model.lr) == (8192, 0.01)


def test_every_network_can_be_trained_by_evolution(monkeypatch, tmp_path):
    monkeypatch.delenv("REVFLIP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["revflip"])
    args = ["fit", *config_args("base", "mlp", "small", "es", "csv"), "--data.batch_size=64"]
    args += ["--trainer.limit_train_batches=2", "--trainer.check_val_every_n_epoch=1"]
    trainer = RevflipCLI([*args, "--trainer.max_epochs=1"]).trainer
    assert any(isinstance(callback, EvolutionStrategies) for callback in trainer.callbacks)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["evolution/fitness_mean"] < 0
    assert trainer.callback_metrics["val/accuracy"] > 0


def test_runs_log_to_wandb_offline_unless_csv_is_chosen(compose):
    logger = compose("base", "mlp").trainer.logger
    assert isinstance(logger, WandbLogger)
    assert logger._offline
    assert isinstance(compose("base", "mlp", "csv").trainer.logger, CSVLogger)


@pytest.mark.parametrize(
    "names",
    [
        ["mlp"],
        ["mlp_large", "sgd"],
        ["cnn"],
        ["mlp", "flipout_bayes"],
        ["cnn", "flipout_bayes"],
        ["mlp", "flipout_multiplicative", "batch_8192"],
        ["mlp", "flipout_multiplicative_shared"],
    ],
    ids="-".join,
)
def test_configuration_trains_and_is_tested_from_its_checkpoint(monkeypatch, tmp_path, names):
    monkeypatch.delenv("REVFLIP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["revflip"])
    args = ["fit", *config_args("base", *names, "small", "csv")]
    trainer = RevflipCLI(
        [*args, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    ).trainer
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/nll"].isfinite()

    (folder,) = (tmp_path / "runs" / "mnist").iterdir()
    assert len(list((folder / "checkpoints").iterdir())) == 2
    args = ["test", f"--config={folder / 'config.yaml'}", "--trainer.logger=false"]
    tested = RevflipCLI([*args, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]).trainer
    assert {"test/accuracy", "test/nll", "test/ece"} <= set(tested.callback_metrics)
