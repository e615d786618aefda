"""What decides the numbers of a run beside its configuration: versions, threads, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightning_revflip import __version__

PACKAGES = ("lightning", "torchmetrics", "numpy")


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What to record of a run, as plain values: for a logger's hyperparameters, for a file.

    Args:
        device: where the run computes, such as `trainer.strategy.root_device`.

    Returns:
        `versions` by name of the package, the `device`, the number of `threads`, and under `git`
        the `commit` of the working directory and whether files differ from it (`dirty`; files that
        git does not track do not count). Without git or a repository there is no `git`.

    Examples:
        >>> sorted(provenance())[-2:]
        ['threads', 'versions']
    """
    git = git_state(Path.cwd())
    return {
        "versions": versions(),
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        **({} if git is None else {"git": git}),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {
        "python": platform.python_version(),
        "lightning-revflip": __version__,
        "torch": str(torch.__version__),  # with its build, such as +cpu
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # only in part installed, such as without Lightning
            continue
    return found


def device_name(device: torch.device) -> str:
    """The kind of a device, and the model of a GPU: `cpu`, `cuda NVIDIA H100`."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_name(device)}"


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that a folder is in, and whether tracked files differ from it.

    Returns:
        None without git, outside of a repository, and before its first commit.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # reads only
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}
