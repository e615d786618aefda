"""The command `revflip fit|validate|test|predict`: a LightningCLI for any model and data module.

    revflip fit --config base.yaml --config lstm.yaml --config rev3.yaml --trainer.max_epochs 3

Later configurations change earlier ones key by key; a key `callbacks+` adds to a list. Classes are
named by their import path and are looked up in installed packages and in the working directory.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_revflip import __version__
from lightning_revflip.callbacks.run_folder import run_folder


class SaveRunConfig(SaveConfigCallback):
    """Gives the whole configuration of a run, its seed and the versions in use to its loggers.

    Also writes it to `config.yaml` beside the folder of the run's checkpoints, from where
    `revflip ... --config config.yaml` repeats the run. Does nothing in a run without a logger.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.logger is None:
            return
        # The third argument keeps what is null: `max_forget_bits: null` is not the default. It goes
        # without its name, which is skip_none before jsonargparse 4.49 and skip_unset after.
        config = json.loads(self.parser.dump(self.config, "json", False))
        for logger in trainer.loggers:
            logger.log_hyperparams({**config, "versions": versions()})
        path = run_folder(trainer) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.parser.dump(self.config, "yaml", False), encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    return {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "lightning": metadata.version("lightning"),
        "lightning-revflip": __version__,
    }


class Parser(LightningArgumentParser):
    """Says where classes are looked up when one is not found."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "class_path" in message and ("No module" in message or "has no attribute" in message):
            message += (
                f"\n\nClasses are looked up in installed packages and in the working directory, "
                f"{os.getcwd()}. Check the spelling, install what is missing, or run revflip where "
                "the module is: the recipes, for example, are found from the root of a checkout."
            )
        super().error(message, ex)


class RevflipCLI(LightningCLI):
    """LightningCLI for any model and any data module.

    There is no `--optimizer`: its parameters would be taken from the model before callbacks such as
    `ReversibleRNN` have swapped layers. Models make their optimizers in `configure_optimizers`.

    Args:
        args: the command line, by default that of the process.
        run: execute the subcommand; otherwise `args` has none and objects are only made.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        self._arguments = sys.argv[1:] if args is None else list(args)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=Parser,
            auto_configure_optimizers=False,
            args=None if args is None else list(args),
            run=run,
        )

    def _parse_ckpt_path(self) -> None:
        """Take from a checkpoint the arguments of the model that no configuration names.

        LightningCLI lets the checkpoint win over `--model.lr=1` without a word. What is null in a
        configuration is taken from the checkpoint as well: sizes that a model learned from its
        data, for example.
        """
        subcommand = self.config.get("subcommand")
        if subcommand is None or not self.config[subcommand].get("ckpt_path"):
            return
        given = self.config.clone()
        super()._parse_ckpt_path()
        prefix = f"{subcommand}.model.init_args"
        named = self.parser.parse_args(self._arguments, defaults=False).get(prefix)
        for name, value in vars(named).items() if named else ():
            if value is not None and f"{prefix}.{name}" in self.config:
                self.config[f"{prefix}.{name}"] = given[f"{prefix}.{name}"]

    def before_instantiate_classes(self) -> None:
        """Warn where a model that nobody trained is about to be used."""
        evaluating = self.subcommand in ("validate", "test", "predict")
        if evaluating and not self.config[self.subcommand].get("ckpt_path"):
            rank_zero_warn(
                f"revflip {self.subcommand} uses the weights that the model starts with: there is "
                "no --ckpt_path with trained ones."
            )


def main(args: Sequence[str] | None = None) -> None:
    """Run `revflip`.

    Args:
        args: the command line, by default that of the process.

    Raises:
        SystemExit: if the command line or a configuration is not valid.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    RevflipCLI(args)


if __name__ == "__main__":
    main()
