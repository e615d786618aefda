"""`revflip list`: recipes and configurations, described by their own files."""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_revflip.cli import main
from lightning_revflip.cli.recipes import Recipe, find_recipe, recipe_names, recipes_folder


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Nothing is broken into two lines."""
    monkeypatch.setenv("COLUMNS", "250")


def make_recipe(folder: Path, **configs: str) -> Recipe:
    (folder / "configs").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""A model\nof things.\n\nData: things.\n"""\n')
    for name, comment in configs.items():
        (folder / "configs" / f"{name}.yaml").write_text(f"# {comment}\nmodel: null\n")
    return Recipe(folder)


def test_recipe_is_described_by_its_docstring(tmp_path):
    recipe = make_recipe(tmp_path / "mine", base="All.")
    assert recipe.name == "mine"
    assert recipe.summary == "A model of things."
    assert recipe.data == "things."


def test_configuration_is_described_by_the_first_sentence_of_its_comment(tmp_path):
    recipe = make_recipe(
        tmp_path / "mine",
        base="What all runs share. Give it first.",
        a="Network: as of Smith et al.,\n# 2018, in v1.5 of it. Give it second.",
        b="For `predict`: prints things",
    )
    described = {each.name: each[1:] for each in recipe.configurations}
    assert described == {
        "base": ("", "What all runs share"),
        "a": ("Network", "as of Smith et al., 2018, in v1.5 of it"),
        "b": ("", "For `predict`: prints things"),
    }


def test_configurations_come_in_the_order_of_the_example_in_base(tmp_path):
    recipe = make_recipe(
        tmp_path / "mine",
        base="All. For example\n#   --config base.yaml --config tiny.yaml --config lstm.yaml",
        csv="Logs to CSV.",
        gru="Cell: nn.GRU.",
        lstm="Cell: nn.LSTM.",
        other="Aim: another.",
        tiny="Size: tiny.",
    )
    assert [each.name for each in recipe.configurations] == [
        *("base", "tiny", "gru", "lstm", "other", "csv")
    ]
    assert recipe.command == "revflip fit --config=recipes/mine/configs/{base,tiny,lstm}.yaml"


def test_all_recipes_are_listed_with_their_number_of_configurations(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert {"ptb", "nmt", "mnist", "es_cartpole"} <= set(recipe_names())
    for name in recipe_names():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        files = list((recipes_folder() / name / "configs").glob("*.yaml"))
        assert line.split()[-1] == str(len(files))


@pytest.mark.parametrize("name", recipe_names())
def test_every_configuration_of_a_recipe_is_listed_with_its_description(name, capsys):
    main(["list", name])
    text = capsys.readouterr().out
    recipe = find_recipe(name)
    assert recipe.summary
    assert recipe.data
    assert {each.name for each in recipe.configurations} == {
        file.stem for file in (recipe.folder / "configs").glob("*.yaml")
    }
    for each in recipe.configurations:
        assert each.kind, f"{each.name}.yaml does not begin with a comment `Kind: what it does`"
        assert f"{each.name} " in text
        assert each.description in text


@pytest.mark.parametrize("name", recipe_names())
def test_command_of_a_recipe_names_files_that_exist(name):
    recipe = find_recipe(name)
    configs = recipe.folder / "configs"
    kinds = [yaml.safe_load((configs / f"{each}.yaml").read_text()) for each in recipe.example]
    assert "class_path" in kinds[0]["model"]
    assert shlex.split(recipe.command)[:2] == ["revflip", "fit"]
    assert os.sep not in recipe.name


def test_unknown_recipe_is_reported_with_those_that_exist(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["list", "mnits"])
    assert exit.value.code == 1
    message = capsys.readouterr().err
    assert "Did you mean mnist?" in message
    assert all(name in message for name in recipe_names())
