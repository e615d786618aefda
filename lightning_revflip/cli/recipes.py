"""The recipes that come with the package: where they are, and what they say of themselves."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class RecipeError(Exception):
    """A command about recipes cannot do what it was asked for; the message tells the user why."""


class Configuration(NamedTuple):
    """A YAML file of a recipe, as its first comment describes it."""

    name: str
    kind: str
    """What it decides, such as `Network`: one or two words before a colon, or nothing."""
    description: str
    """The first sentence, without these words and the stop."""


class Recipe:
    """A recipe in the folder of its own.

    Args:
        folder: a package with a subfolder `configs`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The name that `revflip list` shows."""
        return self.folder.name

    @property
    def summary(self) -> str:
        """What it is: the first paragraph of the package's docstring."""
        return _unwrapped(self._paragraphs[0])

    @property
    def data(self) -> str:
        """What it learns from: the paragraph `Data: ...` of that docstring."""
        found = [text for text in self._paragraphs if text.startswith("Data: ")]
        return _unwrapped(found[0].removeprefix("Data: ")) if found else ""

    @cached_property
    def configurations(self) -> list[Configuration]:
        """All configurations in the order in which they are given: `base` first.

        The example in the comment of `base.yaml` says which kind comes next; kinds that it does not
        have follow by name, then configurations of no kind.
        """
        files = sorted((self.folder / "configs").glob("*.yaml"))
        found = {file.stem: _describe(file) for file in files}
        kinds = [found[name].kind for name in self.example if name in found]

        def position(each: Configuration) -> tuple[bool, bool, int, str]:
            known = kinds.index(each.kind) if each.kind in kinds else len(kinds)
            return each.name != "base", not each.kind, known, each.kind

        return sorted(found.values(), key=position)

    @property
    def example(self) -> list[str]:
        """Names of configurations that make a run, from the comment of `base.yaml`."""
        comment = _first_comment(self.folder / "configs" / "base.yaml")
        return re.findall(r"--config (\w+)\.yaml", comment) or ["base"]

    @property
    def command(self) -> str:
        """The command that runs the example, where there is a folder `recipes`."""
        names = ",".join(self.example)
        stem = f"{{{names}}}" if len(self.example) > 1 else names
        return f"revflip fit --config=recipes/{self.name}/configs/{stem}.yaml"

    @cached_property
    def _paragraphs(self) -> list[str]:
        source = (self.folder / "__init__.py").read_text(encoding="utf-8")
        return (ast.get_docstring(ast.parse(source)) or "").split("\n\n")


# --- finding ---------------------------------------------------------------------------------


def recipes_folder() -> Path:
    """The folder of all recipes: within an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(configs.parent.name for configs in recipes_folder().glob("*/configs"))


def find_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        RecipeError: if there is none, with the names that there are.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"there is no recipe {name!r}, only {', '.join(names)}.{hint}")
    return Recipe(recipes_folder() / name)


def make_importable() -> None:
    """Let `import recipes` find the folder of all recipes, unless it has found others before."""
    if "recipes" in sys.modules:
        return
    folder = recipes_folder()
    spec = importlib.util.spec_from_file_location(
        "recipes", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise RecipeError(f"{folder} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes"] = module
    spec.loader.exec_module(module)


# --- reading ---------------------------------------------------------------------------------


def _describe(file: Path) -> Configuration:
    comment = _first_comment(file)
    match = re.match(r"([A-Z][a-z]+(?: [a-z]+)?): (.*)", comment)
    kind, text = match.groups() if match else ("", comment)
    sentence = re.split(r"\.(?:\s+(?=[A-Z])|$)", text, maxsplit=1)[0]
    return Configuration(file.stem, kind, sentence)


def _first_comment(file: Path) -> str:
    """The lines of comment that a file begins with, as one line."""
    if not file.is_file():
        return ""
    match = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
    lines = match.group().splitlines() if match else []
    return _unwrapped(" ".join(line.removeprefix("#") for line in lines))


def _unwrapped(text: str) -> str:
    return " ".join(text.split())
