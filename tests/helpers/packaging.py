"""Building distributions, and running what was installed from them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FROM_OUTSIDE = ("PYTHONPATH", "PYTHONHOME", "REVFLIP_DATA")
"""Variables by which the checkout or data might be found."""


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist with the backend itself, so that nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (path,) = folder.iterdir()
    return path


@dataclass(frozen=True)
class Installed:
    """An environment with an installed wheel, and an empty folder to work in."""

    python: Path
    folder: Path

    def run(self, *command: str, folder: Path | None = None, status: int = 0) -> str:
        """Run a program of the environment.

        Args:
            command: its name, and arguments.
            folder: where to run it.
            status: that it must end with.

        Returns:
            What it printed.
        """
        environment = {k: v for k, v in os.environ.items() if k not in FROM_OUTSIDE}
        result = subprocess.run(
            [str(self.python.with_name(command[0])), *command[1:]],
            cwd=folder or self.folder,
            env={**environment, "WANDB_MODE": "offline", "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == status, result.stdout
        return result.stdout


def install(wheel: Path, folder: Path, without: Sequence[str] = ()) -> Installed:
    """Install a wheel into a new environment, where its dependencies are those of this one.

    Args:
        wheel: what is installed.
        folder: for the environment.
        without: packages that shall be missing, by the names of their folders.
    """
    venv.create(folder / "venv", symlinks=os.name != "nt")
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    options = ["--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, timeout=120)
    (site_packages,) = (folder / "venv").rglob("site-packages")
    (site_packages / "dependencies.pth").write_text(str(folder / "dependencies"))
    _link_dependencies(folder / "dependencies", ["_?lightning_revflip", *without])
    (folder / "empty").mkdir()
    return Installed(python, folder / "empty")


def _link_dependencies(folder: Path, without: Sequence[str]) -> None:
    """Fill a folder with links to what is installed in this environment, except some packages."""
    folder.mkdir()
    left_out = re.compile(rf"({'|'.join(without)})([.-]|$)")
    for path in (Path(each) for each in sys.path if each.endswith("site-packages")):
        for entry in path.iterdir():
            link = folder / entry.name
            if not left_out.match(entry.name) and not link.is_symlink():
                link.symlink_to(entry)
