"""`AdversarialAttack`: what predictions are worth for images that were made to mislead them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_revflip.applications import AdversarialReport, Predictor, fgsm, pgd, under_attack
from lightning_revflip.callbacks.loggers import can_draw, figure_loggers, log_figure
from lightning_revflip.callbacks.run_folder import run_folder
from recipes.mnist.anomaly import check_task, reports, write_tables
from recipes.mnist.batches import Batch
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.sources import Source, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AdversarialAttack(Callback):
    """Attacks test images when a test ends, and measures accuracy and whether it is noticed.

    The attack knows all networks of the prediction that it attacks: it follows the gradient of the
    log of their mean probability. Changes are in the largest pixel (L-infinity).

    **Logs** `attack/<source>/accuracy/<epsilon>`, `attack/<source>/nll/<epsilon>` and
    `attack/<source>/auroc/<score>/<epsilon>`, how well a score tells attacked images from the
    images as they were. All tables go to `adversarial.md` in the folder of the run, if it has a
    logger, and to the console; and the figure `attack/accuracy` to loggers that take figures, or
    to `adversarial.png` beside the tables if there is none.

    With several processes the first one does all of this. Nothing is written to a checkpoint, and
    nothing happens in other stages, or with `fast_dev_run`.

    Args:
        sources: whose predictions, see `recipes.mnist.sources.Sources`; None: all there are.
        attack: `fgsm`, one step; `pgd`, many.
        epsilons: largest changes, as shares of the range from black to white.
        steps: of `pgd`.
        restarts: of `pgd`.
        transfer_from: one of the sources, whose attacks all of them are given; None: each is
            attacked by itself.
        size: test images, drawn.
        batch_size: images that are attacked at a time.
        num_samples: passes, or networks, see `Sources`.
        bank: folder of the samples, see `Sources`.
        distilled: folder or file of the `DistilledPosterior`, see `Sources`.
        seed: of all that is drawn.

    Raises:
        ValueError: for arguments out of range; when a test starts, if it is not known where samples
            are; when it ends, see `Sources.predictors`.
        TypeError: when a test starts, if it is not one of a `Classifier` on `HandwrittenDigits`.
    """

    def __init__(
        self,
        sources: list[Source] | None = None,
        attack: Literal["fgsm", "pgd"] = "pgd",
        epsilons: Sequence[float] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
        steps: int = 40,
        restarts: int = 1,
        transfer_from: Source | None = None,
        size: int = 1000,
        batch_size: int = 500,
        num_samples: int = 50,
        bank: str | None = None,
        distilled: str | None = None,
        seed: int = 0,
    ) -> None:
        if attack not in ("fgsm", "pgd"):
            raise ValueError(f"attack must be 'fgsm' or 'pgd', got {attack!r}.")
        if not epsilons or not all(0 <= epsilon <= 1 for epsilon in epsilons):
            raise ValueError(
                f"epsilons must be shares of the range of a pixel, from 0 to 1, got {epsilons}."
            )
        sizes = {"steps": steps, "restarts": restarts, "size": size, "batch_size": batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if transfer_from is not None and sources is not None and transfer_from not in sources:
            raise ValueError(
                f"transfer_from must be one of the sources {sources}, got {transfer_from!r}."
            )
        self.sources = Sources(sources, num_samples, bank, distilled, seed)
        self.attack = attack
        self.epsilons = epsilons
        self.steps = steps
        self.restarts = restarts
        self.transfer_from = transfer_from
        self.size = size
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "test":
            check_task(self, trainer, pl_module)
            self.sources.check(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not reports(trainer):
            return
        assert isinstance(pl_module, Classifier)
        data: HandwrittenDigits = trainer.datamodule  # type: ignore[attr-defined]
        predictors = self.sources.predictors(trainer, pl_module)
        if self.transfer_from is not None and self.transfer_from not in predictors:
            raise ValueError(
                f"transfer_from must be one of the sources that there are, {list(predictors)}, "
                f"got {self.transfer_from!r}."
            )
        found = {
            source: self._attacked(predictor, predictors.get(self.transfer_from or ""), data)
            for source, predictor in predictors.items()
        }
        for source, report in found.items():
            values = report.metrics().items()
            pl_module.log_dict({f"attack/{source}/{k}": v for k, v in values}, rank_zero_only=True)
        by = f", made for {self.transfer_from}" if self.transfer_from else ""
        write_tables(
            trainer,
            "adversarial.md",
            [
                f"## {source}: {self.attack}{by}, {report.size} images\n\n{report.table()}"
                for source, report in found.items()
            ],
        )
        draw_figure(trainer, found)

    def _attacked(
        self, victim: Predictor, source: Predictor | None, data: HandwrittenDigits
    ) -> AdversarialReport:
        images, labels = self._draw(data.test_set())
        generator = torch.Generator().manual_seed(self.seed)
        white = data.scale

        def attack(predictor: Predictor, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
            size, data_range = epsilon * white, (0.0, white)
            if self.attack == "fgsm":
                return fgsm(predictor, x, y, size, data_range=data_range)
            return pgd(
                predictor,
                x,
                y,
                size,
                steps=self.steps,
                restarts=self.restarts,
                data_range=data_range,
                generator=generator,
            )

        return under_attack(
            victim,
            images,
            labels,
            self.epsilons,
            attack,
            source=source,
            batch_size=self.batch_size,
        )

    def _draw(self, test: Batch) -> Batch:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(test.labels), generator=generator)[: self.size]
        return Batch(test.images[chosen], test.labels[chosen])


def accuracy_figure(found: Mapping[str, AdversarialReport]) -> Figure:
    """Accuracy against epsilon, a line for each source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for source, report in found.items():
        epsilons = [row.epsilon for row in report.rows]
        axes.plot(epsilons, [row.accuracy for row in report.rows], marker="o", label=source)
    axes.set_xlabel("epsilon (share of the range of a pixel)")
    axes.set_ylabel("accuracy under attack")
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def draw_figure(trainer: Trainer, found: Mapping[str, AdversarialReport]) -> None:
    """Give the figure to the loggers that take some, or write it to the folder of the run."""
    if not trainer.loggers or not can_draw():
        return
    figure = accuracy_figure(found)
    loggers = figure_loggers(trainer)
    for logger in loggers:
        log_figure(logger, "attack/accuracy", figure, trainer.global_step)
    if not loggers:
        figure.savefig(run_folder(trainer) / "adversarial.png", dpi=150)
