"""`revflip list`: tables of the recipes, and of the configurations of one."""

from __future__ import annotations

from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_revflip.cli.recipes import Configuration, Recipe, find_recipe, recipe_names


def print_recipes() -> None:
    """Print all recipes and what can be done with them."""
    table = Table("recipe", "what it is", "data", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("configurations", justify="right")
    for name in recipe_names():
        recipe = find_recipe(name)
        table.add_row(name, recipe.summary, recipe.data, str(len(recipe.configurations)))
    console = Console(highlight=False)
    console.print(table)
    console.print("revflip list RECIPE      its configurations", markup=False)
    console.print("revflip copy RECIPE DIR  a copy to run and edit", markup=False)


def print_configurations(name: str) -> None:
    """Print the configurations of a recipe, grouped by what they decide, and a command.

    Raises:
        RecipeError: if there is no such recipe.
    """
    recipe = find_recipe(name)
    table = Table("", "configuration", "what it is", box=SIMPLE_HEAD, pad_edge=False)
    for label, group in groupby(recipe.configurations, key=_label):
        for number, each in enumerate(group):
            table.add_row(label if number == 0 else "", each.name, each.description)
        table.add_section()
    console = Console(highlight=False)
    console.print(recipe.summary)
    console.print(table)
    console.print("Later configurations change earlier ones. For example:\n")
    print_command(console, recipe)


def print_command(console: Console, recipe: Recipe) -> None:
    """Print a command as one line, however narrow the terminal is: it will be copied."""
    console.print(f"  {recipe.command}", soft_wrap=True, markup=False)


def _label(configuration: Configuration) -> str:
    return "first" if configuration.name == "base" else configuration.kind or "anything else"
