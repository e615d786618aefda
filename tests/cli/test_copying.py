"""`revflip copy`: whole recipes, and no file of the user's is lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_revflip
from lightning_revflip.cli import main
from lightning_revflip.cli.copying import copy_recipe
from lightning_revflip.cli.recipes import RecipeError, recipe_names, recipes_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", recipe_names())
def test_copy_has_every_file_of_the_recipe(name, tmp_path):
    copy_recipe(name, tmp_path)
    assert contents(tmp_path / "recipes" / name) == contents(recipes_folder() / name)


@pytest.mark.parametrize("name", recipe_names())
def test_copy_has_everything_that_the_recipe_imports(name, tmp_path):
    copy_recipe(name, tmp_path)
    text = "".join(
        path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".py", ".yaml")
    )
    for package, module in re.findall(r"from recipes\.(\w+)\.?(\w*) import", text):
        folder = tmp_path / "recipes" / package
        assert (folder / "__init__.py").is_file()
        assert not module or (folder / f"{module}.py").is_file()
    assert (tmp_path / "recipes" / "__init__.py").is_file()


def test_second_recipe_joins_the_first(tmp_path):
    copy_recipe("ptb", tmp_path)
    before = contents(tmp_path)
    written, same = copy_recipe("nmt", tmp_path)
    assert {path.name for path in same} >= {"figures.py", "__init__.py"}
    assert before.items() <= contents(tmp_path).items()
    assert all(path.is_file() for path in written)


def test_copying_again_changes_nothing(tmp_path):
    copy_recipe("es_cartpole", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    written, same = copy_recipe("es_cartpole", tmp_path)
    assert written == []
    assert len(same) > 5
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_edited_file_is_never_overwritten(tmp_path):
    copy_recipe("ptb", tmp_path)
    edited = tmp_path / "recipes" / "common" / "figures.py"
    edited.write_text("mine")
    removed = tmp_path / "recipes" / "ptb" / "module.py"
    removed.unlink()
    with pytest.raises(RecipeError) as error:
        copy_recipe("ptb", tmp_path)
    assert str(edited) in str(error.value)
    assert "--force" in str(error.value)
    assert edited.read_text() == "mine"
    assert not removed.exists()  # nothing was written at all


def test_force_overwrites_what_differs(tmp_path):
    copy_recipe("ptb", tmp_path)
    edited = tmp_path / "recipes" / "ptb" / "module.py"
    edited.write_text("mine")
    own = tmp_path / "recipes" / "ptb" / "own.py"
    own.write_text("mine")
    written, _ = copy_recipe("ptb", tmp_path, force=True)
    assert written == [edited]
    assert own.read_text() == "mine"
    original = recipes_folder() / "ptb" / "module.py"
    assert edited.read_bytes() == original.read_bytes()


def test_command_ends_with_what_to_run_next(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "my folder"
    main(["copy", "ptb", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].strip() == f"cd '{folder}'"
    assert lines[-1].strip().startswith("revflip fit --config=recipes/ptb/configs/{base,")
    monkeypatch.chdir(folder)
    main(["copy", "ptb", "."])
    assert "cd " not in capsys.readouterr().out


@pytest.mark.parametrize("args", [["no_such", "there"], ["ptb", "file"]], ids=["recipe", "folder"])
def test_what_cannot_be_done_is_an_error_without_a_traceback(args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        main(["copy", *args])
    assert exit.value.code == 1
    assert args[args[0] == "ptb"] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_commands_of_the_readme_work_in_the_copy(tmp_path):
    copy_recipe("ptb", tmp_path)
    env = {**os.environ, "PYTHONPATH": str(Path(lightning_revflip.__file__).parents[1])}
    configs = [
        f"--config=recipes/ptb/configs/{name}.yaml" for name in ("base", "small", "lstm", "csv")
    ]
    tiny = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=3",
        "--model.embedding_size=20",
        "--model.hidden_sizes=[20]",
    ]
    for command in (
        ["lightning_revflip.cli", "fit", *configs, *tiny],
        ["recipes.ptb.demo", "--epochs", "1"],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "runs" / "ptb" / "version_0" / "config.yaml").is_file()
    assert (tmp_path / "runs" / "demo").is_dir()


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    target = tmp_path / "mine" / "recipes" / "__init__.py"
    target.parent.mkdir(parents=True)
    target.symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(RecipeError, match="exist and differ"):
        copy_recipe("ptb", tmp_path / "mine")
    copy_recipe("ptb", tmp_path / "mine", force=True)
    assert not (tmp_path / "elsewhere.py").exists()
    assert target.is_file()
    assert not target.is_symlink()


def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_copied(tmp_path):
    (tmp_path / "recipes" / "ptb" / "module.py").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"folders where files go: .*module\.py"):
        copy_recipe("ptb", tmp_path, force=True)
    assert not contents(tmp_path)
