"""`make demo`: one small language model, trained as nn.LSTM and reversibly, side by side.

    python -m recipes.ptb.demo [--epochs 5] [--folder runs/demo]

Offline, on the embedded text. Prints a table, writes a figure and a W&B run per training.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_revflip.callbacks import MemoryMonitor, ReversibleRNN
from lightning_revflip.reversible import MemoryReport, memory_report
from recipes.ptb.data import PennTreebank
from recipes.ptb.module import LanguageModel


class Curve(Callback):
    """Validation perplexities, and how long training steps took."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.perplexities: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)
            self.perplexities.append(float(trainer.callback_metrics["val/perplexity"]))


class Outcome(NamedTuple):
    """What a training gave."""

    name: str
    curve: Curve
    report: MemoryReport | None
    saved_bytes: float
    """Of the whole model, kept for the backward pass of a window."""
    run: str


def train(name: str, callbacks: list[Callback], epochs: int, folder: Path) -> Outcome:
    """Train on the embedded text; same seed, same windows for every name."""
    seed_everything(1, verbose=False)
    curve, logger = Curve(), make_logger(name, folder)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger,
        callbacks=[*callbacks, curve, MemoryMonitor()],
        log_every_n_steps=10,
        reload_dataloaders_every_n_epochs=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    model = LanguageModel(
        embedding_size=200,
        hidden_sizes=[200],
        output_dropout=0.2,
        input_dropout=0.2,
        embedding_dropout=0.05,
        weight_drop=0.1,
    )
    trainer.fit(model, datamodule=PennTreebank(source="embedded", variable_length=False))
    report = memory_report_of_training(model, trainer) if callbacks else None
    saved = float(trainer.callback_metrics["memory/saved_for_backward_bytes"])
    logger.finalize("success")
    return Outcome(name, curve, report, saved, run_folder(logger))


def memory_report_of_training(model: LanguageModel, trainer: Trainer) -> MemoryReport:
    """The report of one more training window: the last pass of a fit is a validation."""
    window = next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
    model.train()
    model(window.inputs)
    return memory_report(model)


def make_logger(name: str, folder: Path) -> Logger:
    """An offline W&B run, or a CSV file where wandb is not installed."""
    try:
        return WandbLogger(
            project="revflip-demo", name=name, save_dir=folder, offline=True, reinit="create_new"
        )
    except ModuleNotFoundError:
        return CSVLogger(folder, name)


def run_folder(logger: Logger) -> str:
    """Where the run was written."""
    if isinstance(logger, WandbLogger):
        return str(Path(logger.experiment.dir).parent)
    return str(logger.log_dir)


def table(ordinary: Outcome, reversible: Outcome) -> Table:
    """Both trainings, a column each."""
    report = reversible.report
    assert report is not None
    shown = Table("", ordinary.name, reversible.name, title="Language model, embedded text")

    def row(label: str, left: str, right: str) -> None:
        shown.add_row(label, left, right)

    def milliseconds(outcome: Outcome) -> str:
        return f"{1e3 * statistics.median(outcome.curve.seconds):.0f} ms"

    final = [outcome.curve.perplexities[-1] for outcome in (ordinary, reversible)]
    row("validation perplexity", f"{final[0]:.1f}", f"{final[1]:.1f}")
    row(
        "recurrent layer keeps",
        f"{report.standard_bytes / 1e6:.2f} MB",
        f"{report.kept_bytes / 1e6:.3f} MB ({report.savings:.0f}x less)",
    )
    row("bits stored per unit and step", "32", f"{report.bits_per_unit_step:.2f}")
    row(
        "whole model keeps",
        f"{ordinary.saved_bytes / 1e6:.1f} MB",
        f"{reversible.saved_bytes / 1e6:.1f} MB",
    )
    row("training step, median", milliseconds(ordinary), milliseconds(reversible))
    return shown


def figure(ordinary: Outcome, reversible: Outcome) -> Figure:
    """Perplexity against steps, and the memory of the recurrent layer."""
    report = reversible.report
    assert report is not None
    drawn = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[3, 2])
    for outcome in (ordinary, reversible):
        left.plot(outcome.curve.steps, outcome.curve.perplexities, marker="o", label=outcome.name)
    left.set(xlabel="training steps", ylabel="validation perplexity")
    left.legend()
    sizes = [report.standard_bytes / 1e6, report.kept_bytes / 1e6]
    bars = right.bar([ordinary.name, reversible.name], sizes, color=["C0", "C1"])
    right.bar_label(bars, fmt="%.3g MB")
    right.set(ylabel="kept by the recurrent layer, MB")
    right.margins(y=0.15)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # what small models need, and step times compare on a busy machine too
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    console = Console()
    start = time.perf_counter()
    console.print("Training the same model twice on the embedded text ...")
    ordinary = train("nn.LSTM", [], options.epochs, options.folder)
    reversible = train(
        "RevLSTM", [ReversibleRNN(3.0, forget_bias=-3.0)], options.epochs, options.folder
    )
    path = options.folder / "demo.png"
    figure(ordinary, reversible).savefig(path, dpi=120)
    console.print(table(ordinary, reversible))
    console.print(f"figure: {path}")
    for outcome in (ordinary, reversible):
        console.print(f"run of {outcome.name}: {outcome.run}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
