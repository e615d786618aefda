"""`UncertaintyReport`: how right and how uncertain a classifier is, on the test and off it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from lightning_revflip.apd import DistilledPosterior
from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.callbacks.run_folder import run_folder
from lightning_revflip.posterior import SampleBank, predictive_entropy
from recipes.common.figures import WITH_FIGURES, log_figure
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.figures import entropy_figure, reliability, reliability_figure
from recipes.mnist.module import Classifier
from recipes.mnist.predictive import in_batches, predict_dropout, predict_network
from recipes.mnist.uncertainty import summary

Source = Literal["network", "dropout", "bank", "distilled"]

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
    a logger. WandbLogger also gets a bank as an artifact, and the table `posterior/diagnostics` if
    an `SGLDSampler` of the same Trainer has diagnosed it. Needs matplotlib.

    With several processes the first one does all of this. Nothing is written to a checkpoint, and
    nothing happens in other stages, or with `fast_dev_run`.

    Args:
        source: `network`, the one under test; `dropout`, passes that drop its units as in training
            (Monte Carlo dropout); `bank`, the samples that `SGLDSampler` collected; `distilled`,
            networks of the `DistilledPosterior` that they became.
        num_samples: number of passes, or of networks that are generated; of a bank so many samples,
            evenly spread, or all if it has fewer.
        dirpath: folder of the bank, or folder or file of the `DistilledPosterior`; None: the bank
            of the `SGLDSampler` of the same Trainer, or `distilled` beside it.
        upload_bank: whether WandbLogger gets the bank.

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
        upload_bank: bool = True,
    ) -> None:
        if source not in get_args(Source):
            raise ValueError(
                f"source must be 'network', 'dropout', 'bank' or 'distilled', got {source!r}."
            )
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        if dirpath is not None and source not in ("bank", "distilled"):
            raise ValueError(
                f"dirpath would have no effect: it belongs to a bank, but source is {source!r}; "
                f"got {dirpath!r}. Leave it out, or set source: bank, or distilled."
            )
        self.source: Source = source
        self.num_samples = num_samples
        self.dirpath = dirpath
        self.upload_bank = upload_bank

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
        if self.source not in ("bank", "distilled"):
            return
        if self.dirpath is None and sampler_of(trainer) is None:
            what = "bank" if self.source == "bank" else "DistilledPosterior"
            raise ValueError(
                f"UncertaintyReport does not know where the {what} is: there is no SGLDSampler "
                "among the callbacks. Give its folder as dirpath."
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._reports(trainer):
            return
        assert isinstance(pl_module, Classifier)
        data: HandwrittenDigits = trainer.datamodule  # type: ignore[attr-defined]
        test, outliers = data.test_set(), data.outlier_images()
        images = {"test": test.images, **({} if outliers is None else {"outliers": outliers})}
        predict = self._predictor(trainer, pl_module)
        probs = {
            name: in_batches(predict, each, data.eval_batch_size, pl_module.device)
            for name, each in images.items()
        }
        what = "distilled" if self.source == "distilled" else "posterior"
        values = summary(probs, test.labels).items()
        pl_module.log_dict({f"{what}/{k}": v for k, v in values}, rank_zero_only=True)
        draw_figures(trainer, what, probs, test.labels)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.source != "bank" or not self._reports(trainer):
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_diagnostics(logger, sampler_of(trainer))
                if self.upload_bank:
                    log_bank(logger, self._bank_folder(trainer))

    def _reports(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _predictor(self, trainer: Trainer, model: Classifier) -> Callable[[Tensor], Tensor]:
        """What gives probabilities (networks, batch, classes) of images (batch, ...)."""
        if self.source == "network":
            return partial(predict_network, model)
        if self.source == "dropout":
            return partial(predict_dropout, model, passes=self.num_samples)
        # A network of its own, as SGLDSampler may have replaced the one under test by an ensemble.
        network = nn.Sequential(OrderedDict(network=model.new_network())).to(model.device)
        if self.source == "distilled":
            distilled = DistilledPosterior.load(self._distilled_path(trainer))
            return partial(predict_generated, distilled, network, n=self.num_samples)
        bank = SampleBank(self._bank_folder(trainer))
        if len(bank) == 0:
            raise ValueError(f"{bank.path} has no sample yet. Train for more than burn_in steps.")
        return partial(bank.predict, network, n=min(self.num_samples, len(bank)))

    def _bank_folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath).expanduser()
        sampler = sampler_of(trainer)
        assert sampler is not None
        return sampler.bank_folder(trainer)

    def _distilled_path(self, trainer: Trainer) -> Path:
        """Where `PosteriorDistillation` and `SaveDistilled` put it, too."""
        if self.dirpath is not None:
            return Path(self.dirpath).expanduser()
        return self._bank_folder(trainer).with_name("distilled")


def predict_generated(
    posterior: DistilledPosterior, network: nn.Module, images: Tensor, n: int
) -> Tensor:
    """Probabilities of generated networks, the same ones for each batch."""
    random = torch.Generator().manual_seed(0)
    return posterior.predict(network, images, n, generator=random)


def sampler_of(trainer: Trainer) -> SGLDSampler | None:
    """The callback that collects samples, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, SGLDSampler)), None)


def draw_figures(trainer: Trainer, what: str, probs: Mapping[str, Tensor], labels: Tensor) -> None:
    """Give the figures to the loggers that take some, or write them to the folder of the run.

    Args:
        trainer: whose loggers.
        what: `posterior` or `distilled`, under which name loggers get them.
        probs: probabilities (networks, images, classes) of the `test` and, if any, the `outliers`.
        labels: of the test images.
    """
    if not trainer.loggers:
        return
    entropies = {name: predictive_entropy(each) for name, each in probs.items()}
    figures = {
        "reliability": reliability_figure(reliability(probs["test"].mean(0), labels)),
        "entropy": entropy_figure(entropies, classes=probs["test"].shape[-1]),
    }
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WITH_FIGURES)]
    for name, figure in figures.items():
        for logger in loggers:
            log_figure(logger, f"{what}/{name}", figure, trainer.global_step)
        if not loggers:
            prefix = "" if what == "posterior" else f"{what}_"
            path = run_folder(trainer) / f"{prefix}{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)


def log_diagnostics(logger: WandbLogger, sampler: SGLDSampler | None) -> None:
    """Give W&B a table of how well the chains have mixed, if that is known."""
    if sampler is None or sampler.mixing is None:
        return
    rows = [
        [space, *(getattr(found, name) for name in DIAGNOSTICS)]
        for space, found in sampler.mixing._asdict().items()
    ]
    logger.log_table("posterior/diagnostics", ["space", *DIAGNOSTICS], rows)


def log_bank(logger: WandbLogger, folder: Path) -> None:
    """Give W&B a bank as an artifact of the run; offline it waits for `wandb sync`."""
    import wandb

    artifact = wandb.Artifact(f"bank-{logger.version}", type="sample-bank")
    artifact.add_dir(str(folder))
    logger.experiment.log_artifact(artifact)
