"""`revflip fit|validate|test|predict`: a LightningCLI for any model and data module.

    revflip fit --config base.yaml --config lstm.yaml --config rev3.yaml --trainer.max_epochs 3

Later configurations change earlier ones key by key; a key `callbacks+` adds to a list. Classes are
named by their import path and are looked up in installed packages and in the working directory.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_revflip.callbacks.run_folder import run_folder
from lightning_revflip.cli.provenance import provenance
from lightning_revflip.cli.recipes import recipe_names


class SaveRunConfig(SaveConfigCallback):
    """Gives the whole configuration of a run, its seed and its `provenance` to its loggers.

    Also writes them to `config.yaml` beside the folder of the run's checkpoints, the provenance as
    a comment, from where `revflip ... --config config.yaml` repeats the run. `seed_everything` is
    the seed that was used, or false if there was none. Does nothing in a run without a logger.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.logger is None:
            return
        # The third argument keeps what is null: `max_forget_bits: null` is not the default. It goes
        # without its name, which is skip_none before jsonargparse 4.49 and skip_unset after.
        config = json.loads(self.parser.dump(self.config, "json", False))
        origin = provenance(trainer.strategy.root_device)
        for logger in trainer.loggers:
            logger.log_hyperparams({**config, **origin})
        path = run_folder(trainer) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        header = "".join(f"# {line}\n" for line in yaml.safe_dump(origin).splitlines())
        text = header + self.parser.dump(self.config, "yaml", False)
        path.write_text(text, encoding="utf-8")


class Parser(LightningArgumentParser):
    """Says where classes and files are looked up when one is not found."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # While a file is read, its folder is the working directory.
        self.folder = Path.cwd()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "class_path" in message and ("No module" in message or "has no attribute" in message):
            message += (
                f"\n\nClasses are looked up in installed packages and in the working directory, "
                f"{self.folder}. Check the spelling, install what is missing, or run revflip where "
                "the module is."
            )
        if "class_path 'lightning.LightningModule'" in message:
            message += (
                "\n\nNo configuration before this one names a model. Give the one that does first: "
                "of the recipes it is base.yaml."
            )
        name = missing_recipe(message, self.folder)
        if name is not None:
            message += (
                f"\n\nThere is no folder recipes/{name} in the working directory, {self.folder}. "
                f"Change to the folder that has it, or copy it there: revflip copy {name} ."
            )
        super().error(message, ex)


def missing_recipe(message: str, folder: Path) -> str | None:
    """The recipe whose file or class an error did not find, if a folder lacks it."""
    if "does not exist" not in message and "No module named 'recipes" not in message:
        return None
    named = set(re.findall(r"\brecipes[./](\w+)", message)) & set(recipe_names())
    return next((name for name in sorted(named) if not (folder / "recipes" / name).is_dir()), None)


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
