"""`UncertaintyReport`: how right and how uncertain a classifier is, on the test and off it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_revflip.applications.predictors import in_batches
from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.callbacks.loggers import (
    can_draw,
    figure_loggers,
    log_artifact,
    log_figure,
    log_table,
)
from lightning_revflip.callbacks.run_folder import run_folder
from lightning_revflip.posterior import predictive_entropy
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.figures import entropy_figure, reliability, reliability_figure
from recipes.mnist.module import Classifier
from recipes.mnist.sources import Source, Sources, sampler_of
from recipes.mnist.uncertainty import summary

OF_SAMPLES = ("sample", "bank", "distilled")
DIAGNOSTICS = ["num_chains", "num_draws", "ess_min", "ess_median", "rhat_max", "rhat_median"]


class UncertaintyReport(Callback):
    """Measures a prediction and its uncertainty when a test ends, on test images and outliers.

    The prediction is the mean of the probabilities that one network or several give, see `source`:
    for all images of the data module's test set, and for its outliers.

    **Logs** `posterior/...`, or `distilled/...` for what was distilled, so that one test can report
    on its bank as well: `samples`, the number of networks; `accuracy`, `nll` (nats per image) and
    `ece`; the means `predictive_entropy_test` and `predictive_entropy_outliers`, of several
    networks `mutual_information_test` and `mutual_information_outliers` as well; and how well
    outliers are told from test images, `auroc/<score>`, `aupr_in/<score>`, `aupr_out/<score>` and
    `fpr95/<score>`, see `recipes.mnist.uncertainty.detection`.

    **Figures** `reliability` and `entropy`, under the same name, to WandbLogger and
    TensorBoardLogger; PNG files in the folder of the run if there is neither; none in a run without
    a logger, and none without matplotlib. The two loggers also get the table
    `posterior/diagnostics` of a bank, if an `SGLDSampler` of the same Trainer has diagnosed it.
    WandbLogger gets the bank, or what it was distilled to, as an artifact, see `upload`.

    With several processes the first one does all of this. Nothing is written to a checkpoint, and
    nothing happens in other stages, or with `fast_dev_run`.

    Args:
        source: `network`, the one under test; `dropout`, passes that drop its units as in training
            (Monte Carlo dropout); `bank`, the samples that `SGLDSampler` collected, and `sample`,
            the last of them; `distilled`, networks of the `DistilledPosterior` that they became.
        num_samples: number of passes, or of networks that are generated; of a bank so many samples,
            evenly spread, or all if it has fewer.
        dirpath: folder of the bank, or folder or file of the `DistilledPosterior`; None: the bank
            of the `SGLDSampler` of the same Trainer, or `distilled` beside it.
        upload: whether WandbLogger gets the artifact `bank-<run>` of source `bank`, or
            `distilled-<run>` of source `distilled`.

    Raises:
        ValueError: for arguments out of range or without effect; when a test starts, if there is
            neither `dirpath` nor an `SGLDSampler`; when it ends, if the network has no dropout, or
            the bank is that of another network.
        TypeError: when a test starts, if it is not one of a `Classifier` on `HandwrittenDigits`.
    """

    def __init__(
        self,
        source: Source = "network",
        num_samples: int = 200,
        dirpath: str | None = None,
        upload: bool = True,
    ) -> None:
        if source not in get_args(Source):
            *others, last = map(repr, get_args(Source))
            raise ValueError(f"source must be {', '.join(others)} or {last}, got {source!r}.")
        if dirpath is not None and source not in OF_SAMPLES:
            raise ValueError(
                f"dirpath would have no effect: it belongs to a bank, but source is {source!r}; "
                f"got {dirpath!r}. Leave it out, or set source: bank, or distilled."
            )
        self.source: Source = source
        self.num_samples = num_samples
        self.dirpath = dirpath
        self.upload = upload
        self._sources = Sources(
            [source],
            num_samples,
            bank=None if source == "distilled" else dirpath,
            distilled=dirpath if source == "distilled" else None,
            seed=0,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "test":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, Classifier) or not isinstance(data, HandwrittenDigits):
            raise TypeError(
                "UncertaintyReport is about a Classifier on HandwrittenDigits, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )
        data.outlier_images()  # raises, if they are not there, before the test has run
        if self.source in OF_SAMPLES and self.dirpath is None and sampler_of(trainer) is None:
            raise ValueError(
                f"UncertaintyReport does not know where the {self.source} is: there is no "
                "SGLDSampler among the callbacks. Give its folder as dirpath."
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._reports(trainer):
            return
        assert isinstance(pl_module, Classifier)
        data: HandwrittenDigits = trainer.datamodule  # type: ignore[attr-defined]
        test, outliers = data.test_set(), data.outlier_images()
        images = {"test": test.images, **({} if outliers is None else {"outliers": outliers})}
        predictor = self._sources.predictors(trainer, pl_module)[self.source]
        probs = {
            name: in_batches(predictor, each, data.eval_batch_size) for name, each in images.items()
        }
        what = "distilled" if self.source == "distilled" else "posterior"
        values = summary(probs, test.labels).items()
        pl_module.log_dict({f"{what}/{k}": v for k, v in values}, rank_zero_only=True)
        draw_figures(trainer, what, probs, test.labels)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._reports(trainer):
            return
        for logger in trainer.loggers:
            if self.source == "bank":
                log_diagnostics(logger, sampler_of(trainer), trainer.global_step)
            if self.upload and self.source == "bank":
                log_artifact(logger, "bank", "sample-bank", self._sources.bank_path(trainer))
            if self.upload and self.source == "distilled":
                path = self._sources.distilled_path(trainer)
                log_artifact(logger, "distilled", "distilled-posterior", path)

    def _reports(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def draw_figures(trainer: Trainer, what: str, probs: Mapping[str, Tensor], labels: Tensor) -> None:
    """Give the figures to the loggers that take some, or write them to the folder of the run.

    Args:
        trainer: whose loggers.
        what: `posterior` or `distilled`, under which name loggers get them.
        probs: probabilities (networks, images, classes) of the `test` and, if any, the `outliers`.
        labels: of the test images.
    """
    if not trainer.loggers or not can_draw():
        return
    entropies = {name: predictive_entropy(each) for name, each in probs.items()}
    figures = {
        "reliability": reliability_figure(reliability(probs["test"].mean(0), labels)),
        "entropy": entropy_figure(entropies, classes=probs["test"].shape[-1]),
    }
    loggers = figure_loggers(trainer)
    for name, figure in figures.items():
        for logger in loggers:
            log_figure(logger, f"{what}/{name}", figure, trainer.global_step)
        if not loggers:
            prefix = "" if what == "posterior" else f"{what}_"
            path = run_folder(trainer) / f"{prefix}{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)


def log_diagnostics(logger: Logger, sampler: SGLDSampler | None, step: int) -> None:
    """Give a logger a table of how well the chains have mixed, if that is known."""
    if sampler is None or sampler.mixing is None:
        return
    rows = [
        [space, *(getattr(found, name) for name in DIAGNOSTICS)]
        for space, found in sampler.mixing._asdict().items()
    ]
    log_table(logger, "posterior/diagnostics", ["space", *DIAGNOSTICS], rows, step)
