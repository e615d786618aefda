"""What runs log is what docs/logging.md says, no more and no less."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_revflip.callbacks import Flipout, SGLDSampler
from lightning_revflip.modules import EvolutionModule
from recipes.mnist.toy import PosteriorFigure, ToyClassifier, TwoMoons
from tests.helpers.loggers import RecordingWandb
from tests.helpers.models import quiet_trainer
from tests.helpers.recipe_runs import (
    CSV,
    RECORDING,
    config_args,
    csv_rows,
    fit,
    fit_and_test,
    last_callback,
    logger_args,
    tiny,
)
from tests.helpers.sampled_models import CLASSES, loader

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"
NOT_ON_A_CPU = {"memory/peak_bytes"}
OF_LIGHTNING = {"epoch", "step"}


def documented(section: str) -> list[str]:
    """The names in the first column of the table of a section."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def pattern(name: str) -> str:
    """A regular expression; what stands in angle brackets may be anything but a slash."""
    return re.sub(r"<\w+>", "[^/]+", name)


def differences(logged: set[str], rows: list[str]) -> list[str]:
    """What is logged and not in exactly one row, and rows of what is never logged."""
    found = {name: [row for row in rows if re.fullmatch(pattern(row), name)] for name in logged}
    wrong = [f"{name} is in rows {of}" for name, of in found.items() if len(of) != 1]
    used = {row for of in found.values() for row in of}
    return wrong + [f"{row} is never logged" for row in rows if row not in used]


class Logged:
    """Names that runs have logged."""

    def __init__(self):
        self.numbers, self.figures, self.tables, self.artifacts = set(), set(), set(), set()

    def add(self, folder: Path, recording: RecordingWandb) -> None:
        self.numbers |= {name for row in csv_rows(folder) for name in row} - OF_LIGHTNING
        self.figures |= {name for name, *_ in recording.figures}
        self.tables |= {name for name, *_ in recording.tables}
        self.artifacts |= {each.name for each in recording.artifacts}


class Loaders(LightningDataModule):
    """Few examples, the same in each stage."""

    def train_dataloader(self):
        return loader()

    val_dataloader = test_dataloader = train_dataloader


class TwoLayers(LightningModule):
    """Two linear layers for two classes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def folders(cwd, monkeypatch):
    """Makes an empty folder for each run, in which it works without data of the user."""

    def make(name: str) -> Path:
        folder = cwd / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        return folder

    return make


@pytest.mark.slow
def test_runs_of_everything_log_what_is_documented(folders):
    logged, settings = Logged(), {}

    def run(name: str, *args: str, recipe: str = "", test: bool = True) -> Path:
        folder = folders(name)
        short = tiny(recipe, folder) if recipe else []
        command = [*args, *short, *logger_args(folder, CSV, RECORDING)]
        trainer = (fit_and_test if test else fit)(*command).trainer
        logged.add(folder, trainer.loggers[1])
        return folder

    run("ptb", *config_args("ptb", "base", "small", "lstm", "rev3"), recipe="ptb")
    run("nmt", *config_args("nmt", "base", "small", "lstm", "emb20h", "rev3"), recipe="nmt")
    run("flipout", *config_args("mnist", "base", "mlp", "flipout_bayes"), recipe="mnist")
    sampled = run(
        "posterior",
        *config_args("mnist", "base", "mlp", "sgld"),
        *last_callback(burn_in=2, every_n_steps=1),
        *config_args("mnist", "apd_online"),
        *last_callback(rank=2, buffer_size=4, every_n_samples=2, steps=2),
        *config_args("mnist", "apd_anomaly"),
        *last_callback(size=20, num_samples=4),
        *config_args("mnist", "apd_adversarial"),
        *last_callback(size=20, num_samples=4, steps=2, epsilons="[0.1]"),
        recipe="mnist",
    )
    (bank,) = sampled.rglob("posterior")
    run(
        "distillation",
        *config_args("mnist", "apd_offline"),
        *(f"--data.bank={bank}", f"--model.codec.bank={bank}", "--model.codec.rank=2"),
        *("--data.batches_per_epoch=2", "--trainer.max_steps=2", "--model.gradient_penalty=1"),
        *last_callback(**{"network.image_shape": "[1,8,8]"}),
        test=False,
    )
    run("cartpole", *config_args("es_cartpole", "base"), recipe="es_cartpole")

    def train(name: str, module: LightningModule, data: Any, *callbacks: Callback) -> None:
        folder = folders(name)
        loggers = [CSVLogger(folder), RecordingWandb(folder)]
        options = {"max_epochs": 1, "log_every_n_steps": 1, "callbacks": [*callbacks]}
        trainer = quiet_trainer(folder, logger=loggers, **options)
        trainer.fit(module, data)
        if is_overridden("test_step", module):
            trainer.test(module, data, verbose=False)
        logged.add(folder, loggers[1])
        settings.update(loggers[1].settings)

    train("evolution", EvolutionModule(nn.Linear(4, CLASSES), population=4), Loaders())
    train("two_flipouts", TwoLayers(), Loaders(), Flipout(["layers.0"]), Flipout(["layers.2"]))
    figure = PosteriorFigure(steps=2, gaussian_rank=2, num_networks=4)
    sampler = SGLDSampler(network="network", num_data=20, burn_in=0, every_n_steps=2)
    train("toy", ToyClassifier(), TwoMoons(batches_per_epoch=20), sampler, figure)

    assert {"Flipout", "Flipout_2", "SGLDSampler"} <= set(settings)
    numbers = [name for name in documented("Numbers") if name not in NOT_ON_A_CPU]
    assert differences(logged.numbers, numbers) == []
    assert differences(logged.figures, documented("Figures")) == []
    assert differences(logged.tables, documented("Tables")) == []
    assert differences(logged.artifacts, documented("Artifacts")) == []


def test_differences_are_found_in_both_directions():
    rows = ["a/<x>", "b/c", "b/<x>"]
    assert differences({"a/1", "b/d", "b/c"}, rows) == ["b/c is in rows ['b/c', 'b/<x>']"]
    assert differences({"a/1", "a/1/2", "b/c"}, rows[:2]) == ["a/1/2 is in rows []"]
    assert differences({"a/1"}, rows[:2]) == ["b/c is never logged"]


def test_what_is_not_on_a_cpu_is_documented():
    assert set(documented("Numbers")) >= NOT_ON_A_CPU
