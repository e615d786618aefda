"""The commands that are not Lightning's, and the help that shows all of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_revflip import __version__
from lightning_revflip.cli.recipes import RecipeError, recipe_names

TRAINING = {
    "fit": "train a model",
    "validate": "measure a model on its validation data",
    "test": "measure a model on its test data",
    "predict": "predict with a model",
}
"""Commands of LightningCLI, which reads their arguments; `revflip fit --help` shows them."""

SHELLS = ("bash", "zsh", "tcsh")


def run_command(args: Sequence[str]) -> None:
    """Run `list`, `copy` or `doctor`, or print help or the version.

    Args:
        args: the command line; empty: print help.

    Raises:
        SystemExit: if `args` are not valid, or the command fails, with a message.
    """
    parser = make_parser()
    parsed = parser.parse_args(args)
    try:
        if parsed.print_completion is not None:
            print(completion_script(parsed.print_completion))
        elif parsed.command is None:
            parser.print_help()
        elif parsed.command == "list":
            from lightning_revflip.cli.listing import print_configurations, print_recipes

            print_recipes() if parsed.recipe is None else print_configurations(parsed.recipe)
        elif parsed.command == "copy":
            from lightning_revflip.cli.copying import copy_and_tell

            copy_and_tell(parsed.recipe, parsed.folder, parsed.force)
        else:
            from lightning_revflip.cli.doctor import print_diagnosis

            parser.exit(0 if print_diagnosis() else 1)
    except (RecipeError, OSError) as error:
        command = "" if parsed.command is None else f" {parsed.command}"
        parser.exit(1, f"revflip{command}: {error}\n")


def make_parser(completing: bool = False) -> argparse.ArgumentParser:
    """All commands with their options; of those that train, the ones that name files.

    Args:
        completing: let the parser know the names of recipes. To run a command it need not: the
            command has the better message for a name that does not exist.
    """
    recipes = recipe_names() if completing else None
    parser = argparse.ArgumentParser(
        prog="revflip",
        description="Train from configurations, and run and edit the recipes.",
        epilog="revflip COMMAND --help tells more of one.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"lightning_revflip {__version__}",
        help="print the version",
    )
    parser.add_argument(
        "--print_completion",
        metavar="SHELL",
        choices=SHELLS,
        help=f"print a script that completes commands, recipes and files: {', '.join(SHELLS)}",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    listing = commands.add_parser("list", help="list the recipes, or what one has to offer")
    listing.add_argument(
        "recipe", metavar="RECIPE", nargs="?", choices=recipes, help="list its configurations"
    )
    copying = commands.add_parser("copy", help="copy a recipe into a folder, to run and edit it")
    copying.add_argument("recipe", metavar="RECIPE", choices=recipes, help="see revflip list")
    copying.add_argument("folder", metavar="DIR", type=Path, help="gets a folder recipes/RECIPE")
    copying.add_argument("--force", action="store_true", help="overwrite files that differ")

    commands.add_parser("doctor", help="check the installation, this machine and the data")
    for name, description in TRAINING.items():
        training = commands.add_parser(name, help=description)
        training.add_argument("-c", "--config", metavar="FILE")
        training.add_argument("--ckpt_path", metavar="FILE")
    return parser


def completion_script(shell: str) -> str:
    """A script for the completion of a shell.

    Raises:
        RecipeError: if shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise RecipeError(
            "the script is written by shtab, which is not installed: pip install shtab"
        ) from error
    parser = make_parser(completing=True)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.metavar in ("FILE", "DIR"):
                action.complete = shtab.FILE if action.metavar == "FILE" else shtab.DIRECTORY
    return str(shtab.complete(parser, shell))
