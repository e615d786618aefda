"""Short runs of the recipes, by the command line."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import recipes
from lightning_revflip.cli import RevflipCLI
from tests.recipes.small_nmt import write_text

RECIPES = Path(recipes.__path__[0])
CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
TENSORBOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
WANDB = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True}}
RECORDING = {"class_path": "tests.helpers.loggers.RecordingWandb"}

TINY = {
    "ptb": (
        "--data.source=embedded",
        "--model.embedding_size=8",
        "--model.hidden_sizes=[8]",
        "--trainer.limit_train_batches=3",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1",
        "--trainer.max_epochs=1",
    ),
    "nmt": (
        "--data.batch_size=8",
        "--data.eval_batch_size=4",
        "--model.embedding_size=8",
        "--model.hidden_size=20",
        "--model.max_extra_length=4",
        "--model.lr=0.02",
        "--trainer.max_epochs=1",
    ),
    "mnist": (
        "--data.source=digits",
        "--data.batch_size=100",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.max_epochs=1",
    ),
    "es_cartpole": (
        "--model.hidden=[4]",
        "--model.population=16",
        "--model.base_perturbations=2",
        "--model.eval_episodes=2",
        "--data.per_epoch=2",
        "--trainer.max_epochs=1",
    ),
}


def tiny(recipe: str, folder: Path) -> list[str]:
    """Arguments that make a run take a moment; text to translate is written to `folder`."""
    text = write_text(folder) if recipe == "nmt" else {}
    return [*TINY[recipe], *(f"--data.{name}={value}" for name, value in text.items())]


def config_args(recipe: str, *names: str) -> list[str]:
    """The arguments that name configurations of a recipe."""
    return [f"--config={RECIPES / recipe / 'configs' / name}.yaml" for name in names]


def composer(recipe: str) -> Callable[..., SimpleNamespace]:
    """What makes all that configurations of a recipe name, and runs nothing.

    Returns:
        A function of names of configurations and of further `args`. It returns model, data and
        trainer, and the callbacks by their class, of which there may be one each.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["revflip"])
        cli = RevflipCLI(config_args(recipe, "base", "csv"), run=False)

    def compose(*names: str, args: Sequence[str] = ()) -> SimpleNamespace:
        cli.config = cli.parser.parse_args([*config_args(recipe, *names), *args])
        vars(cli).pop("config_dump", None)  # what models take their `hparams` from
        made = cli.parser.instantiate_classes(cli.config)
        callbacks = {type(callback): callback for callback in made.trainer.callbacks}
        assert len(callbacks) == len(made.trainer.callbacks)
        return SimpleNamespace(
            model=made.model, data=made.data, trainer=made.trainer, callbacks=callbacks
        )

    return compose


def last_callback(**settings: object) -> list[str]:
    """Arguments for the last of the callbacks that were named before."""
    return [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]


def logger_args(folder: Path, *loggers: dict[str, Any]) -> list[str]:
    """The argument that puts loggers which write to `folder` in the place of others."""
    found = [
        {**each, "init_args": {"save_dir": str(folder), **each.get("init_args", {})}}
        for each in loggers
    ]
    path = folder / "loggers.json"
    path.write_text(json.dumps({"trainer": {"logger": found, "log_every_n_steps": 1}}))
    return [f"--config={path}"]


def fit(*args: str) -> RevflipCLI:
    """Train as `revflip fit` does."""
    return RevflipCLI(["fit", *args])


def fit_and_test(*args: str) -> RevflipCLI:
    """Train, and test what was trained with the same loggers."""
    cli = fit(*args)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return cli


def csv_rows(folder: Path) -> list[dict[str, str]]:
    """The lines of the one `metrics.csv` below a folder, without empty cells."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value} for row in rows]


def last_values(folder: Path) -> dict[str, float]:
    """What was logged last under each name, from the one `metrics.csv` below a folder."""
    return {name: float(value) for row in csv_rows(folder) for name, value in row.items()}
