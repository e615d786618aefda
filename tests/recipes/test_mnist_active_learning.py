"""The recipe of active learning, on the small digits."""

import logging
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import recipes
from lightning_revflip.applications import Round
from recipes.mnist.active_learning import accuracy_figure, main, run
from recipes.mnist.data import HandwrittenDigits

CONFIG = Path(recipes.__path__[0]) / "mnist" / "configs" / "apd_active_learning.yaml"
FEW = {"rounds": 2, "steps": 60, "burn_in": 20, "every_n_steps": 4, "num_samples": 10}


def digits() -> HandwrittenDigits:
    return HandwrittenDigits(source="digits", batch_size=32)


@pytest.mark.parametrize(
    ("posterior", "acquisition"),
    [("network", "entropy"), ("dropout", "bald"), ("sgld", "batch_bald"), ("apd", "bald")],
)
def test_every_posterior_labels_digits(tmp_path, posterior, acquisition):
    settings = FEW | {"rank": 4, "distillation_steps": 2, "folder": str(tmp_path)}
    if posterior == "dropout":
        settings["dropout"] = 0.5
    rounds = run(digits(), posterior, acquisition, **settings)
    assert [each.num_labelled for each in rounds] == [20, 30]
    assert all(0.1 < each.accuracy["test"] <= 1 for each in rounds)
    assert set(rounds[0].accuracy) == {"validation", "test"}
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert not (tmp_path / "training" / "bank").exists() or posterior in ("sgld", "apd")


def test_random_labels_teach_the_digits(tmp_path):
    rounds = run(
        digits(),
        "network",
        "random",
        rounds=2,
        labels_per_round=300,
        steps=400,
        folder=str(tmp_path),
    )
    assert rounds[0].accuracy["test"] < rounds[1].accuracy["test"]
    assert rounds[1].accuracy["test"] > 0.85


@pytest.fixture
def log_level():
    """The command turns down the log of a Trainer; afterwards it is as before."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("log_level")
def test_command_runs_the_configuration_and_goes_on(tmp_path, monkeypatch, capsys):
    command = ["active_learning", f"--config={CONFIG}", "--data.source=digits"]
    command += [f"--folder={tmp_path}", "--steps=60", "--burn_in=20", "--every_n_steps=1"]
    command += ["--num_samples=20", "--rank=4", "--distillation_steps=2"]
    printed = []
    for rounds in (1, 2):
        monkeypatch.setattr("sys.argv", [*command, f"--rounds={rounds}"])
        main()
        printed.append(capsys.readouterr().out)
    assert "20 labels: accuracy validation " in printed[0]
    assert "20 labels" not in printed[1]
    assert "30 labels: accuracy validation " in printed[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"posterior": "apd", "rank": 10}, "rank=10 needs more than 10 samples.*collects 10"),
        ({"posterior": "sgld", "num_samples": 11}, "num_samples=11.*the 10 that a round collects"),
        ({"posterior": "apd", "steps": 10}, "a round collects 0"),
    ],
    ids=["rank", "samples", "none"],
)
def test_more_than_a_round_collects_is_reported_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(digits(), **FEW | settings, folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_dropout_that_there_is_not_is_reported_before_training(tmp_path):
    with pytest.raises(ValueError, match="needs a network with dropout"):
        run(digits(), "dropout", folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_figure_shows_mean_and_spread():
    runs = [[Round(20, {"test": 0.5 + 0.1 * i}, []), Round(30, {"test": 0.7}, [])] for i in (0, 1)]
    figure = accuracy_figure({"bald": runs, "random": runs[:1]})
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.55, 0.7])
    assert axes.lines[1].get_ydata().tolist() == pytest.approx([0.5, 0.7])
    assert len(axes.collections) == 1  # one run has no spread
