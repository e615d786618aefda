"""Every combination of the MNIST configurations can be composed, made and run."""

from itertools import product

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_revflip.callbacks import EvolutionStrategies, Flipout, SGLDSampler
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.flipout import Gaussian, MultiplicativeGaussian
from recipes.mnist.report import UncertaintyReport
from tests.helpers.recipe_runs import RECIPES, composer, config_args

NETWORKS = {
    "mlp": ("mlp", [100]),
    "mlp_large": ("mlp", [400, 400]),
    "cnn": ("cnn", [1024]),
}
OPTIMIZERS = {None: ("adam", 1e-3, 0.0), "sgd": ("sgd", 0.1, 0.9)}
APPLICATIONS = {"apd_anomaly", "apd_adversarial", "apd_active_learning"}
OTHERS = {"base", "small", "csv", "batch_8192", "es", "apd_offline", "apd_online", "apd_toy"}
REPORTS = {"report": ("network", 0.0), "mc_dropout": ("dropout", 0.5)}
SAMPLERS = {  # sampler, temperature, chains, learning rate
    "sgld": ("sgld", 1, 1, 0.5),
    "psgld": ("psgld", 1, 1, 0.005),
    "sghmc": ("sghmc", 1, 1, 0.05),
    "csgld": ("sgld", 1, 1, 0.5),
    "sgld_chains": ("sgld", 1, 4, 0.5),
    "deep_ensemble": ("sgld", 0, 10, 0.4),
}
FLIPOUT = {
    "flipout_bayes": ("flipout", Gaussian(init_std=0.05, prior_std=1.0)),
    "flipout_multiplicative": ("flipout", MultiplicativeGaussian(1.0)),
    "flipout_multiplicative_shared": ("shared", MultiplicativeGaussian(1.0)),
}


@pytest.fixture(scope="module")
def compose():
    return composer("mnist")


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
    assert {path.stem for path in (RECIPES / "mnist" / "configs").iterdir()} == {
        *APPLICATIONS,
        *OTHERS,
        *NETWORKS,
        *FLIPOUT,
        *REPORTS,
        *SAMPLERS,
        *optimizers,
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", FLIPOUT)
def test_every_network_can_be_perturbed(compose, network, name):
    run = compose("base", network, name, "batch_8192", "csv")
    (callback,) = (each for each in run.trainer.callbacks if isinstance(each, Flipout))
    assert (callback.estimator, callback.perturbation) == FLIPOUT[name]
    assert (run.data.batch_size, run.model.lr) == (8192, 0.01)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", REPORTS)
def test_every_network_can_be_reported_on(compose, network, name):
    run = compose("base", network, name, "csv")
    (report,) = (each for each in run.trainer.callbacks if isinstance(each, UncertaintyReport))
    assert (report.source, run.model.dropout) == REPORTS[name]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_network_can_be_sampled(compose, network, name):
    run = compose("base", network, name, "csv")
    callbacks = run.trainer.callbacks
    (sampler,) = (each for each in callbacks if isinstance(each, SGLDSampler))
    found = sampler.sampler, sampler.temperature, sampler.chains, run.model.lr
    assert found == SAMPLERS[name]
    assert (run.model.optimizer_name, run.model.momentum) == ("sgd", 0.0)
    assert run.data.batch_size == 100 * sampler.chains
    assert sampler.burn_in < run.trainer.max_steps
    (report,) = (each for each in callbacks if isinstance(each, UncertaintyReport))
    assert (report.source, report.dirpath) == ("bank", None)


def test_every_network_can_be_trained_by_evolution(cwd):
    args = ["fit", *config_args("mnist", "base", "mlp", "small", "es", "csv")]
    args += [
        "--data.batch_size=64",
        "--trainer.limit_train_batches=2",
        "--trainer.check_val_every_n_epoch=1",
    ]
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
        ["mlp", "report"],
        ["mlp", "mc_dropout"],
    ],
    ids="-".join,
)
def test_configuration_trains_and_is_tested_from_its_checkpoint(cwd, names):
    args = ["fit", *config_args("mnist", "base", *names, "small", "csv")]
    trainer = RevflipCLI(
        [*args, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    ).trainer
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/nll"].isfinite()

    (folder,) = (cwd / "runs" / "mnist").iterdir()
    assert len(list((folder / "checkpoints").iterdir())) == 2
    args = ["test", f"--config={folder / 'config.yaml'}", "--trainer.logger=false"]
    tested = RevflipCLI([*args, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]).trainer
    assert {"test/accuracy", "test/nll", "test/ece"} <= set(tested.callback_metrics)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampled_network_is_reported_on_from_its_checkpoint(cwd, name):
    args = ["fit", *config_args("mnist", "base", "mlp", name, "small", "csv")]
    args += [
        "--data.batch_size=100",
        "--trainer.max_epochs=2",
        "--trainer.check_val_every_n_epoch=1",
    ]
    # The sampler is the last callback of all, and the options of a list are those of its last item.
    args += ["--trainer.callbacks.burn_in=10", "--trainer.callbacks.every_n_steps=2"]
    if name == "csgld":
        args.append("--trainer.callbacks.schedule.init_args.cycle_steps=10")
    trainer = RevflipCLI(args).trainer
    chains = SAMPLERS[name][2]
    assert trainer.callback_metrics["sgld/samples"] >= chains
    assert trainer.callback_metrics["val/nll"].isfinite()

    (folder,) = (cwd / "runs" / "mnist").iterdir()
    args = ["test", f"--config={folder / 'config.yaml'}"]
    args.append(f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")
    found = RevflipCLI(args).trainer.callback_metrics
    assert found["posterior/samples"] >= chains
    assert found["posterior/samples"] % chains == 0
    # The test is answered by an ensemble of at most 20 samples, the report by all.
    assert float(found["posterior/accuracy"] - found["test/accuracy"]) == pytest.approx(0, abs=0.05)
    assert 0 < found["posterior/auroc/predictive_entropy"] < 1
