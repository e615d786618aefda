"""The model card of each recipe has the same parts, names every file, and what it says works."""

import re
import runpy

import pytest
from lightning.pytorch import Trainer

from tests.helpers.markdown import python_blocks
from tests.helpers.recipe_runs import RECIPES

READMES = sorted(RECIPES.glob("*/README.md"))
SECTIONS = ["Run it", "Data", "Model and training", "Measured", "Intended use and limits"]


def recipe_of(path):
    return path.parent.name


@pytest.mark.parametrize("path", READMES, ids=recipe_of)
def test_sections_are_those_of_all_recipes_in_the_same_order(path):
    found = re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE)
    assert [name for name in found if name in SECTIONS] == SECTIONS
    assert found[0] == SECTIONS[0]
    assert found[-1] == SECTIONS[-1]


@pytest.mark.parametrize("path", READMES, ids=recipe_of)
def test_every_configuration_and_sweep_is_named(path):
    code = re.findall(r"```.*?```|`[^`]+`", path.read_text(), re.DOTALL)
    named = set(re.findall(r"\w+", " ".join(code)))
    assert {file.stem for file in path.parent.rglob("*.yaml")} <= named


@pytest.mark.parametrize("path", READMES, ids=recipe_of)
def test_commands_name_configurations_that_there_are(path):
    commands = re.findall(r"\$CONFIGS/\{?([\w,]+)\}?\.yaml", path.read_text())
    names = {name for command in commands for name in command.split(",")}
    assert "base" in names
    assert names <= {file.stem for file in (path.parent / "configs").iterdir()}


@pytest.mark.parametrize("path", READMES, ids=recipe_of)
def test_links_lead_to_files_and_headings(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [each.lower().replace(" ", "-") for each in headings]


@pytest.mark.parametrize("path", READMES, ids=recipe_of)
def test_example_in_python_trains(monkeypatch, cwd, path):
    original = Trainer.__init__
    short = {"max_steps": 1, "limit_val_batches": 0, "accelerator": "cpu", "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}

    def one_step(self, **settings):
        original(self, **{**settings, **short, **quiet})

    monkeypatch.setattr(Trainer, "__init__", one_step)
    (block,) = (each for each in python_blocks(path) if "trainer.fit" in each)
    (cwd / "example.py").write_text(block)
    assert runpy.run_path(str(cwd / "example.py"))["trainer"].global_step == 1
