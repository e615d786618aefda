"""Help, version and completion, what commands import, and where `recipes` come from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_revflip
from lightning_revflip.cli import main
from lightning_revflip.cli.commands import TRAINING

ROOT = Path(lightning_revflip.__file__).parents[1]


def printed_by(args: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 0
    return capsys.readouterr().out


def run(*command: str, cwd: Path) -> str:
    """Standard output of a process that finds this package wherever it runs."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, check=True, text=True
    ).stdout


@pytest.mark.parametrize("args", [["--help"], []], ids=["asked for", "no command"])
def test_help_tells_of_every_command(args, capsys):
    if args:
        text = printed_by(args, capsys)
    else:
        main(args)
        text = capsys.readouterr().out
    for command in ("list", "copy", "doctor", *TRAINING):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [command]]
        assert len(line.split()) > 2


def test_commands_that_train_are_those_of_lightning():
    from lightning.pytorch.cli import LightningCLI

    assert set(TRAINING) == set(LightningCLI.subcommands())


def test_help_of_training_is_that_of_lightning(capsys):
    assert "--trainer.max_epochs" in printed_by(["fit", "--help"], capsys)


def test_version_is_that_of_the_package(capsys):
    assert (
        printed_by(["--version"], capsys) == f"lightning_revflip {lightning_revflip.__version__}\n"
    )


def test_unknown_command_is_reported_with_those_that_exist(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "train" in message
    assert "doctor" in message


def test_list_copy_and_help_import_neither_torch_nor_lightning(tmp_path):
    code = (
        "import sys\n"
        "from lightning_revflip.cli import main\n"
        "for args in (['list'], ['list', 'ptb'], ['copy', 'ptb', 'mine'], []): main(args)\n"
        "print({'torch', 'lightning', 'wandb', 'recipes', 'jsonargparse'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).splitlines()[-1] == "set()"


def test_import_of_the_trainer_needs_neither_wandb_nor_a_recipe(tmp_path):
    code = (
        "import sys, lightning_revflip.cli.training\nprint({'wandb', 'recipes'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "set()"


def test_recipe_in_the_working_directory_comes_before_the_original(tmp_path):
    main(["copy", "ptb", str(tmp_path)])
    with (tmp_path / "recipes" / "ptb" / "module.py").open("a") as module:
        module.write("\n\nclass Mine(LanguageModel):\n    pass\n")
    script = shutil.which("revflip", path=str(Path(sys.executable).parent))
    command = [sys.executable, "-m", "lightning_revflip.cli"] if script is None else [script]
    config = run(
        *command,
        "fit",
        "--config=recipes/ptb/configs/base.yaml",
        "--model.class_path=recipes.ptb.module.Mine",
        "--print_config",
        cwd=tmp_path,
    )
    assert "class_path: recipes.ptb.module.Mine" in config


def test_completion_script_knows_commands_recipes_and_files(capsys):
    pytest.importorskip("shtab")
    main(["--print_completion", "bash"])
    script = capsys.readouterr().out
    assert "list copy doctor" in script.replace("'", "").replace('"', "")
    assert "es_cartpole" in script
    assert "_shtab_compgen_files" in script


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)  # import shtab raises ImportError
    with pytest.raises(SystemExit):
        main(["--print_completion", "bash"])
    assert "pip install shtab" in capsys.readouterr().err
