"""Commands that train: every one of them, configurations, what a run records of itself."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything

from lightning_revflip.cli import main
from tests.helpers.recipe_runs import config_args, last_values

pytestmark = pytest.mark.usefixtures("cwd")


def revflip(subcommand: str, *args: str, configs: tuple[str, ...] = ()) -> None:
    main([subcommand, *config_args("ptb", *configs), *args])


SMALL = (
    "--model.embedding_size=20",
    "--model.hidden_sizes=[20]",
    "--model.lr=2",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """The folder of a short reversible run that logged to CSV."""
    revflip("fit", *SMALL, configs=("base", "small", "gru", "rev2", "csv"))
    return tmp_path / "runs" / "ptb" / "version_0"


def test_fit_then_validate_test_and_predict_from_its_own_config(run_folder, tmp_path, capsys):
    fitted = last_values(run_folder)
    for name in ("train/loss", "train/perplexity", "val/perplexity", "train/tokens_per_second"):
        assert fitted[name] > 0
    assert 0 < fitted["reversible/bits_per_unit_step"] <= 3
    config = f"--config={run_folder / 'config.yaml'}"
    best = next((run_folder / "checkpoints").glob("epoch000-perplexity*.ckpt"))

    main(["validate", config, f"--ckpt_path={best}"])
    validated = last_values(tmp_path / "runs" / "ptb" / "version_1")
    assert validated["val/perplexity"] == pytest.approx(fitted["val/perplexity"], rel=1e-6)

    main(["test", config, f"--ckpt_path={best}", "--trainer.limit_test_batches=2"])
    assert last_values(tmp_path / "runs" / "ptb" / "version_2")["test/perplexity"] > 1

    capsys.readouterr()
    args = ['--data.prompts=["the prince said"]', "--data.new_tokens=5", "--data.temperature=0"]
    main(["predict", config, *config_args("ptb", "predict"), f"--ckpt_path={best}", *args])
    printed = capsys.readouterr().out
    assert "the prince said" in printed
    assert "(perplexity " in printed


def test_fit_goes_on_from_a_checkpoint(run_folder, tmp_path):
    last = run_folder / "checkpoints" / "last.ckpt"
    config = f"--config={run_folder / 'config.yaml'}"
    main(["fit", config, f"--ckpt_path={last}", "--trainer.max_epochs=2"])
    steps = torch.load(last, weights_only=True)["global_step"]
    resumed = tmp_path / "runs" / "ptb" / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(resumed, weights_only=True)["global_step"] == 2 * steps


def test_run_records_its_configuration_seed_and_versions(run_folder):
    record = yaml.safe_load((run_folder / "hparams.yaml").read_text())
    assert record["seed_everything"] == 1111
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "lightning", "lightning-revflip"} <= set(record["versions"])
    assert record["model"]["init_args"]["cell"] == "gru"
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    callbacks = {c["class_path"]: c.get("init_args") for c in config["trainer"]["callbacks"]}
    assert callbacks["lightning_revflip.callbacks.ReversibleRNN"]["max_forget_bits"] == 2.0


def test_fit_needs_no_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    revflip("fit", *SMALL, configs=("base", "small", "lstm", "csv"))
    assert last_values(tmp_path / "runs" / "ptb" / "version_0")["val/perplexity"] > 1


def test_classes_of_the_working_directory_are_found(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel, BoringDataModule\n"
        "class Model(BoringModel):\n"
        "    def on_fit_end(self):\n"
        "        open('fitted', 'w').close()\n"
    )
    data = "--data=lightning.pytorch.demos.boring_classes.BoringDataModule"
    revflip("fit", "--model=mine.Model", data, "--trainer.fast_dev_run=true")
    assert (tmp_path / "fitted").exists()


@pytest.mark.parametrize("path", ["no.such.Model", "recipes.ptb.module.NoSuchModel"])
def test_class_that_is_not_found_is_reported_with_where_it_was_looked_up(path, tmp_path, capsys):
    with pytest.raises(SystemExit):
        revflip("fit", f"--model={path}")
    message = capsys.readouterr().err
    assert path in message
    assert f"looked up in installed packages and in the working directory, {tmp_path}" in message


def test_other_mistakes_are_reported_without_that_hint(capsys):
    with pytest.raises(SystemExit):
        revflip("fit", "--trainer.max_epochs=many", configs=("base",))
    message = capsys.readouterr().err
    assert "many" in message
    assert "looked up" not in message


def test_missing_recipe_is_reported_with_the_command_that_copies_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "recipes/ptb/configs/base.yaml"])
    assert "revflip copy ptb ." in capsys.readouterr().err
    (tmp_path / "recipes" / "ptb").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "recipes/ptb/configs/bsae.yaml"])
    assert "revflip copy" not in capsys.readouterr().err


BORING = (
    "fit",
    "--model=lightning.pytorch.demos.boring_classes.BoringModel",
    "--data=lightning.pytorch.demos.boring_classes.BoringDataModule",
    "--trainer.max_steps=1",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=.",
    "--trainer.enable_progress_bar=false",
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--seed_everything=7"], 7), (["--seed_everything=true"], 1234), ([], 1234)],
    ids=["number", "true", "none given"],
)
def test_recorded_seed_is_the_one_in_use(given, expected, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setenv("PL_GLOBAL_SEED", "1234")
    monkeypatch.setattr(
        "lightning.pytorch.cli.seed_everything",
        lambda *args, **kwargs: seeds.append(seed_everything(*args, **kwargs)) or seeds[-1],
    )
    main([*BORING, *given])
    (used,) = seeds
    config = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert config["seed_everything"] == used == expected


def test_run_without_a_seed_says_so(tmp_path):
    main([*BORING, "--seed_everything=false"])
    config = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert config["seed_everything"] is False


def test_config_holds_the_provenance_that_loggers_got(run_folder):
    logged = yaml.safe_load((run_folder / "hparams.yaml").read_text())
    lines = (run_folder / "config.yaml").read_text().splitlines()
    header = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    recorded = yaml.safe_load("\n".join(line for line in header if "==" not in line))
    assert recorded == {name: logged[name] for name in ("device", "threads", "versions")}
    assert recorded["device"] == "cpu"
    assert recorded["threads"] == torch.get_num_threads()
