"""The command `revflip`: training from configurations, the recipes, a check of the installation.

    revflip {list, copy, doctor, fit, validate, test, predict}

Commands import what they need when they run: `list`, `copy` and `--help` neither Lightning nor
torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_revflip.cli.commands import TRAINING, run_command

if TYPE_CHECKING:
    from lightning_revflip.cli.training import RevflipCLI, SaveRunConfig

__all__ = ["RevflipCLI", "SaveRunConfig", "main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run `revflip`.

    Args:
        args: the command line, by default that of the process.

    Raises:
        SystemExit: if the command line or a configuration is not valid, or a command says so.
    """
    given = sys.argv[1:] if args is None else list(args)
    # The working directory comes first, so that copies of recipes are found before the originals.
    here = os.getcwd()
    sys.path[:] = [here, *(path for path in sys.path if path != here)]
    if is_training(given):
        from lightning_revflip.cli.training import RevflipCLI

        RevflipCLI(args)
    else:
        run_command(given)


def is_training(args: Sequence[str]) -> bool:
    """Whether LightningCLI reads this command line: `fit ...`, also `--config all.yaml fit`."""
    if not args:
        return False
    first = args[0]
    return first in TRAINING or first.startswith(("-c", "--config", "--print_config"))


def __getattr__(name: str) -> Any:
    if name in ("RevflipCLI", "SaveRunConfig"):
        from lightning_revflip.cli import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
