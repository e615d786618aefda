"""`revflip copy`: a recipe, and what it needs of others, in a folder of the user's."""

from __future__ import annotations

import filecmp
import os
import re
import shlex
import shutil
from pathlib import Path

from rich.console import Console

from lightning_revflip.cli.listing import print_command
from lightning_revflip.cli.recipes import Recipe, RecipeError, find_recipe, recipes_folder


def copy_and_tell(name: str, folder: Path, force: bool) -> None:
    """Copy a recipe and print what was done, and the next command.

    Raises:
        RecipeError: as for `copy_recipe`.
        OSError: if a file cannot be written.
    """
    written, same = copy_recipe(name, folder, force)
    console = Console(highlight=False)
    there = f", {len(same)} were there already" if same else ""
    target = folder / "recipes" / name
    files = "1 file" if len(written) == 1 else f"{len(written)} files"
    console.print(f"{target}: copied {files}{there}. To run it:\n", markup=False, soft_wrap=True)
    if folder.resolve() != Path.cwd():
        console.print(f"  cd {shlex.quote(str(folder))}", markup=False, soft_wrap=True)
    print_command(console, find_recipe(name))


def copy_recipe(name: str, folder: Path, force: bool = False) -> tuple[list[Path], list[Path]]:
    """Copy a recipe into `folder/recipes`, with what it imports of other recipes.

    Args:
        name: of the recipe.
        folder: where the commands of the recipe's README will run.
        force: overwrite files that exist and differ.

    Returns:
        The files that were written, and those that were there with the same content.

    Raises:
        RecipeError: if there is no such recipe, or, without `force`, files exist and differ; then
            nothing is written.
        OSError: if a file cannot be written.
    """
    source = recipes_folder()
    same: list[Path] = []
    differing: list[Path] = []
    new: list[Path] = []
    for file in files_of(find_recipe(name)):
        target = folder / "recipes" / file.relative_to(source)
        if target.is_file() and filecmp.cmp(file, target, shallow=False):
            same.append(target)
        else:
            (differing if os.path.lexists(target) else new).append(target)
    folders = [str(target) for target in differing if target.is_dir()]
    if folders:
        raise RecipeError(f"there are folders where files go: {', '.join(folders)}. Move them.")
    if differing and not force:
        listed = "\n".join(f"  {target}" for target in differing)
        raise RecipeError(
            f"these files exist and differ, so nothing was copied:\n{listed}\n"
            "Choose another folder, or overwrite them with --force."
        )
    for target in (*new, *differing):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink()  # what it leads to is not overwritten
        # Contents only: an installed file may be read-only, its copy is to be edited.
        shutil.copyfile(source / target.relative_to(folder / "recipes"), target)
    return [*new, *differing], same


def files_of(recipe: Recipe) -> list[Path]:
    """All files that a recipe needs: its own, those of packages that it names, `__init__.py`."""
    source = recipes_folder()
    needed, waiting = set[Path](), [recipe.folder]
    while waiting:
        package = waiting.pop()
        needed.add(package)
        for file in _files(package):
            if file.suffix in (".py", ".yaml"):
                named = re.findall(r"\brecipes\.(\w+)", file.read_text(encoding="utf-8"))
                packages = {source / name for name in named if (source / name).is_dir()}
                waiting += packages - needed
    return [source / "__init__.py", *(file for each in sorted(needed) for file in _files(each))]


def _files(package: Path) -> list[Path]:
    found = (path for path in package.rglob("*") if "__pycache__" not in path.parts)
    return sorted(path for path in found if path.is_file())
