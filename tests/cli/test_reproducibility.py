"""Same seed, same curves, bit by bit; other seed, other curves: the recipes and the methods."""

import csv
from pathlib import Path

import pytest

import recipes
from lightning_revflip.cli import main
from tests.recipes.small_nmt import write_text

RECIPES = Path(recipes.__path__[0])

EVERY_RUN = (
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_model_summary=false",
)
PTB = (
    "--data.source=embedded",
    "--model.embedding_size=20",
    "--model.hidden_sizes=[20]",
    "--trainer.limit_train_batches=3",
)
NMT = (
    "--data.batch_size=8",
    "--model.embedding_size=12",
    "--model.hidden_size=20",
    "--model.beam_size=1",
    "--model.max_length_ratio=0.01",
    "--model.max_extra_length=8",
    "--trainer.limit_train_batches=2",
)
MNIST = ("--trainer.limit_train_batches=4",)
CARTPOLE = (
    "--model.population=8",
    "--model.base_perturbations=2",
    "--model.eval_episodes=2",
    "--data.per_epoch=2",
)
SGLD = (
    *MNIST,
    "--trainer.callbacks.burn_in=1",
    "--trainer.callbacks.every_n_steps=1",
    "--trainer.callbacks.max_samples=4",
)
ES = (
    "--data.batch_size=64",
    "--trainer.limit_train_batches=3",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.callbacks.population=16",
    "--trainer.callbacks.base_perturbations=2",
)
RUNS = {
    "ptb, ReversibleRNN": ("ptb", "base small lstm rev3 csv", PTB),
    "ptb, Flipout": ("ptb", "base small lstm_flipout_dropconnect csv", PTB),
    "nmt, ReversibleRNN": ("nmt", "base small lstm emb20h rev3 csv", NMT),
    "mnist, Flipout": ("mnist", "base mlp small flipout_bayes csv", MNIST),
    "mnist, SGLDSampler": ("mnist", "base mlp sgld small csv", SGLD),
    "mnist, EvolutionStrategies": ("mnist", "base mlp small es csv", ES),
    "es_cartpole, FlipoutES": ("es_cartpole", "base csv", CARTPOLE),
}


@pytest.fixture
def curves(cwd, monkeypatch, tmp_path):
    """Trains with a seed and returns what was logged, as text, without what is measured in time."""

    def train(name: str, seed: int) -> list[dict[str, str]]:
        recipe, configurations, settings = RUNS[name]
        configs = RECIPES / recipe / "configs"
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        given = [f"--config={configs / each}.yaml" for each in configurations.split()]
        if recipe == "nmt":
            given += [f"--data.{side}={file}" for side, file in write_text(folder).items()]
        main(["fit", *given, *settings, *EVERY_RUN, f"--seed_everything={seed}"])
        (file,) = folder.rglob("metrics.csv")
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]

    return train


QUICK = ("ptb, ReversibleRNN", "mnist, SGLDSampler")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_curves_depend_on_the_seed_and_on_nothing_else(name, curves):
    if name.startswith("es_cartpole"):
        pytest.importorskip("gymnasium")
    first = curves(name, seed=1)
    assert sum(value != "" for row in first for value in row.values()) > 5
    assert curves(name, seed=1) == first
    assert curves(name, seed=2) != first
