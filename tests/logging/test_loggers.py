"""Every recipe works with any logger, with none, and without the packages of loggers."""

import functools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import nn

from lightning_revflip.callbacks import (
    EvolutionStrategies,
    Flipout,
    PosteriorDistillation,
    ReversibleRNN,
    SGLDSampler,
)
from lightning_revflip.callbacks.loggers import (
    _warn_without_matplotlib,
    can_draw,
    figure_loggers,
    log_artifact,
    log_figure,
    log_settings,
    log_table,
    settings_of,
)
from lightning_revflip.flipout import Gaussian
from lightning_revflip.sgld import CyclicalSchedule
from tests.helpers.loggers import RecordingTensorBoard, RecordingWandb
from tests.helpers.models import quiet_trainer
from tests.helpers.recipe_runs import (
    CSV,
    TENSORBOARD,
    config_args,
    csv_rows,
    fit,
    fit_and_test,
    last_callback,
    logger_args,
    tiny,
)
from tests.helpers.sampled_models import blobs, loader
from tests.helpers.tensorboard_file import read_names, read_scalars

RUNS = {
    "ptb": [*config_args("ptb", "base", "small", "lstm", "rev3")],
    "nmt": [*config_args("nmt", "base", "small", "lstm", "emb20h", "rev3")],
    "mnist": [
        *config_args("mnist", "base", "mlp", "sgld"),
        *last_callback(burn_in=2, every_n_steps=1),
    ],
    "es_cartpole": [*config_args("es_cartpole", "base")],
}
REVERSIBLE = {"reversible/bits_per_layer", "reversible/forget_gates"}
FIGURES = {
    "ptb": REVERSIBLE,
    "nmt": REVERSIBLE | {"nmt/attention"},
    "es_cartpole": {"evolution/returns"},
}
TEXTS = {"nmt": {"nmt/translations"}}


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import raises
    _warn_without_matplotlib.cache_clear()
    yield
    _warn_without_matplotlib.cache_clear()


# --- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RUNS)
def test_tensorboard_holds_the_numbers_of_the_csv_file_figures_and_texts(cwd, recipe):
    pytest.importorskip("tensorboardX")
    fit(*RUNS[recipe], *tiny(recipe, cwd), *logger_args(cwd, CSV, TENSORBOARD))
    (path,) = cwd.rglob("events.out.tfevents.*")
    expected = [
        (name, int(row["step"]), pytest.approx(float(value), rel=1e-6))
        for row in csv_rows(cwd)
        for name, value in row.items()
        if name != "step"
    ]
    found = [each for each in read_scalars(path) if each[0] != "hp_metric"]
    assert sorted(found) == sorted(expected, key=lambda each: (*each[:2], each[2].expected))
    assert read_names(path, "image") == FIGURES.get(recipe, set())
    texts = {name.removesuffix("/text_summary") for name in read_names(path, "tensor")}
    assert texts == TEXTS.get(recipe, set())


@pytest.mark.parametrize("recipe", RUNS)
def test_recipe_runs_without_a_logger(cwd, recipe):
    cli = fit_and_test(*RUNS[recipe], *tiny(recipe, cwd), "--trainer.logger=false")
    assert cli.trainer.state.finished
    assert list(cwd.rglob("*.png")) == []


def test_a_test_without_matplotlib_reports_all_but_figures(cwd, no_matplotlib):
    args = [*RUNS["mnist"], *tiny("mnist", cwd), *config_args("mnist", "csv")]
    with pytest.warns(UserWarning, match="No figures are drawn") as caught:
        cli = fit_and_test(*args)
    assert sum("No figures" in str(each.message) for each in caught) == 1
    assert cli.trainer.callback_metrics["posterior/accuracy"] > 0
    assert list(cwd.rglob("*.png")) == []


def test_a_figure_that_was_asked_for_by_name_needs_matplotlib(cwd, no_matplotlib):
    with pytest.raises(ModuleNotFoundError, match="PosteriorFigure draws with matplotlib"):
        fit(*config_args("mnist", "apd_toy", "csv"))


# --- figures, tables, artifacts --------------------------------------------------------------


def test_figures_and_tables_go_to_the_loggers_that_take_them(tmp_path):
    wandb, tensorboard, other = RecordingWandb(), RecordingTensorBoard(), CSVLogger(tmp_path)
    loggers = [wandb, tensorboard, other]
    assert figure_loggers(SimpleNamespace(loggers=loggers)) == loggers[:2]
    figure = Figure()
    for logger in loggers:
        log_figure(logger, "a", figure, step=3)
        log_table(logger, "b", ["x", "y"], [(1, "p|q")], step=4)
    assert wandb.figures == tensorboard.figures == [("a", 3, [figure])]
    assert wandb.tables == [("b", 4, ["x", "y"], [[1, "p|q"]])]
    assert tensorboard.texts == [("b", 4, "x | y\n--- | ---\n1 | p\\|q")]


def test_artifact_is_a_file_or_a_folder_and_for_wandb_alone(tmp_path):
    folder = tmp_path / "bank"
    folder.mkdir()
    (folder / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    wandb = RecordingWandb()
    for logger in (wandb, CSVLogger(tmp_path)):
        log_artifact(logger, "bank", "sample-bank", folder)
        log_artifact(logger, "file", "text", tmp_path / "two")
    found = [(each.name, each.type, [*each.manifest.entries]) for each in wandb.artifacts]
    assert found == [("bank-x1", "sample-bank", ["one"]), ("file-x1", "text", ["two"])]


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_there_is_one_warning_where_figures_would_be(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figure_loggers(SimpleNamespace(loggers=[CSVLogger(tmp_path)])) == []
    with pytest.warns(UserWarning, match="matplotlib is not installed. .* pip install matplotlib"):
        assert figure_loggers(SimpleNamespace(loggers=[RecordingWandb()])) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not can_draw()


# --- settings --------------------------------------------------------------------------------


def test_settings_of_every_callback_are_plain_values():
    assert settings_of(ReversibleRNN(2.0, ["encoder.*", nn.LSTM])) == {
        "max_forget_bits": 2.0,
        "targets": ["encoder.*", "LSTM"],
        "chunk_steps": None,
        "forget_bias": 0.0,
    }
    gaussian = settings_of(Flipout(perturbation=Gaussian(init_std=0.1)))["perturbation"]
    assert gaussian["init_args"]["init_std"] == 0.1
    sampler = settings_of(SGLDSampler(Path("bank"), num_data=9, sampler_options={"a": 1}))
    assert (sampler["dirpath"], sampler["sampler_options"]) == ("bank", {"a": 1})
    assert sampler["combine"] == "log_mean_softmax"
    schedule = functools.partial(CyclicalSchedule, cycle_steps=5)
    sampler = settings_of(SGLDSampler(num_data=9, burn_in=0, schedule=schedule))
    assert sampler["schedule"] == {
        "class_path": "lightning_revflip.sgld.schedules:CyclicalSchedule",
        "init_args": {"cycle_steps": 5},
    }
    assert settings_of(PosteriorDistillation(rank=3, buffer_size=9))["module"]["r1"] == 1.0
    evolution = settings_of(EvolutionStrategies(0.1, 8, loss=nn.CrossEntropyLoss(reduction="none")))
    assert evolution["loss"] == "CrossEntropyLoss()"


def test_settings_of_a_class_of_ones_own_are_those_that_it_keeps():
    class Mine(ReversibleRNN):
        def __init__(self, bits: float, other: int, **kwargs):
            super().__init__(bits, **kwargs)
            self.bits = bits

    assert settings_of(Mine(2.0, 1, targets=["a"])) == {"bits": 2.0}


def test_callbacks_of_one_class_have_settings_of_their_own():
    logger, callbacks = RecordingWandb(), [ReversibleRNN(1.0), Flipout(), ReversibleRNN(2.0)]
    trainer = SimpleNamespace(loggers=[logger], callbacks=callbacks)
    for callback in callbacks:
        log_settings(trainer, callback)
    assert list(logger.settings) == ["ReversibleRNN", "Flipout", "ReversibleRNN_2"]
    assert logger.settings["ReversibleRNN_2"]["max_forget_bits"] == 2.0


def test_settings_of_a_callback_reach_the_logger_of_a_trainer(tmp_path):
    sampler = SGLDSampler(num_data="auto", burn_in=1, every_n_steps=1, temperature=0.5)
    logger = CSVLogger(tmp_path, "name", "version")
    trainer: Trainer = quiet_trainer(tmp_path, callbacks=[sampler], logger=logger, max_epochs=1)
    trainer.fit(blobs(), loader())
    record = yaml.safe_load((tmp_path / "name" / "version" / "hparams.yaml").read_text())
    assert record["SGLDSampler"]["temperature"] == 0.5
    assert not isinstance(record["SGLDSampler"]["temperature"], torch.Tensor)
