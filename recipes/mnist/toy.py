"""The toy of Wang et al. (2018): 20 points of two classes, and what is known between them.

Samples of a network of two hidden layers are distilled, and the figure `PosteriorFigure` draws
shows what they predict and what took their place. See `configs/apd_toy.yaml`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import repeat
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_revflip.apd.offline import distil
from lightning_revflip.callbacks.loggers import figure_loggers, log_artifact, log_figure
from lightning_revflip.callbacks.run_folder import run_folder
from lightning_revflip.posterior import LowRankGaussian, Posterior, SampleBank, predictive_entropy
from recipes.mnist.batches import Batch
from recipes.mnist.networks import mlp
from recipes.mnist.sources import sampler_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGE = 3.0
"""Predictions are drawn for inputs from -EDGE to EDGE."""


class TwoMoons(LightningDataModule):
    """Points in the plane, on two half circles that reach into each other, one for each class.

    A batch for training holds all points; validation and test have 500 others.

    Args:
        num_points: of both classes, an even number.
        noise: standard deviation of their distance from the half circles, whose radius is 1.
        batches_per_epoch: number of batches, after which Lightning validates.
        seed: of the points.

    Raises:
        ValueError: for an odd number of points, and other values out of range.
    """

    def __init__(
        self,
        num_points: int = 20,
        noise: float = 0.1,
        batches_per_epoch: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_points < 2 or num_points % 2:
            raise ValueError(f"num_points must be an even number from 2 on, got {num_points}.")
        if noise < 0 or batches_per_epoch < 1:
            raise ValueError(
                "noise must not be negative, and batches_per_epoch must be at least 1, got "
                f"{noise} and {batches_per_epoch}."
            )
        self.batches_per_epoch = batches_per_epoch
        random = torch.Generator().manual_seed(seed)
        self.points = two_moons(num_points, noise, random)
        self.others = two_moons(500, noise, random)

    def train_dataloader(self) -> RepeatedBatch:
        return RepeatedBatch(self.points, self.batches_per_epoch)

    def val_dataloader(self) -> RepeatedBatch:
        return RepeatedBatch(self.others, 1)

    def test_dataloader(self) -> RepeatedBatch:
        """Those of the validation: nothing is chosen by them."""
        return self.val_dataloader()


class RepeatedBatch:
    """A loader of one batch, a number of times."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        return repeat(self.batch, self.times)


def two_moons(num_points: int, noise: float, random: torch.Generator) -> Batch:
    """Points on two half circles, float32, shape (num_points, 2), and their classes."""
    labels = torch.arange(num_points) % 2
    angles = math.pi * torch.rand(num_points, generator=random)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    sides = 1 - 2.0 * labels[:, None]  # the second half circle is the first one upside down
    points = sides * (circle - torch.tensor([0.5, 0.25]))
    return Batch(points + noise * torch.randn(num_points, 2, generator=random), labels)


class ToyClassifier(LightningModule):
    """A network 2-10-10-2 that is trained on the mean negative log-likelihood of the classes.

    Logs `train/loss`, `val/accuracy` and `test/accuracy`.

    Args:
        hidden: units of each hidden layer.
        lr: learning rate of SGD.
    """

    def __init__(self, hidden: Sequence[int] = (10, 10), lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hidden = hidden
        self.lr = lr
        self.network = self.new_network()

    def new_network(self) -> nn.Sequential:
        """A network like that of the model, with initial weights of its own."""
        return mlp(2, self.hidden, 2)

    def forward(self, points: Tensor) -> Tensor:
        """Logits, shape (batch, 2), of points, shape (batch, 2)."""
        logits: Tensor = self.network(points)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch.images), batch.labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_accuracy("val/accuracy", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_accuracy("test/accuracy", batch)

    def _log_accuracy(self, name: str, batch: Batch) -> None:
        correct = self(batch.images).argmax(-1) == batch.labels
        self.log(name, correct.float().mean(), prog_bar=True, batch_size=len(batch.labels))

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=self.lr)


class PosteriorFigure(Callback):
    """Distils the samples of an `SGLDSampler`, and draws what both predict in the plane.

    When training ends, a generator is trained on all samples and saved in `distilled` beside their
    bank. Then decision boundaries and predictive entropy are drawn for the samples, for networks
    of the generator and, as a rival of it, of a low-rank normal distribution: `posterior.png` in
    the folder of the run, and `toy/posterior` in WandbLogger and TensorBoardLogger. WandbLogger
    also gets what was distilled, as the artifact `distilled-<run>`.

    **Logs** `toy/entropy_error_apd` and `toy/entropy_error_gaussian`: how far the predictive
    entropy is from that of the samples, mean over the plane, in nats. It is not 0 for other samples
    of the same posterior: `toy/entropy_error_halves` is the distance of two halves of the samples.

    Args:
        rank: of the generator's codec, see `distil`; None: the weights are the codes, as in the
            paper.
        gaussian_rank: of the normal distribution.
        steps: of the generator.
        lr: of the generator and its critic.
        num_networks: networks of which the mean prediction is drawn; of the samples all, if there
            are fewer.
        seed: of training and drawing.

    Raises:
        ValueError: at the start of training, without an `SGLDSampler`; at its end, for a rank that
            is too large for the samples.
        TypeError: at the start of training, unless it is that of a `ToyClassifier` on `TwoMoons`.
        ModuleNotFoundError: at the start of training, without matplotlib.
    """

    def __init__(
        self,
        rank: int | None = None,
        gaussian_rank: int = 100,
        steps: int = 4000,
        lr: float = 1e-3,
        num_networks: int = 200,
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.gaussian_rank = gaussian_rank
        self.steps = steps
        self.lr = lr
        self.num_networks = num_networks
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, ToyClassifier) or not isinstance(data, TwoMoons):
            raise TypeError(
                "PosteriorFigure is about a ToyClassifier on TwoMoons, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )
        if sampler_of(trainer) is None:
            raise ValueError(
                "PosteriorFigure draws the samples of an SGLDSampler, and there is none among the "
                "callbacks. Give one before it."
            )
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "PosteriorFigure draws with matplotlib, which is not installed. Install it: "
                "pip install matplotlib."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, ToyClassifier)
        sampler = sampler_of(trainer)
        assert sampler is not None
        bank = SampleBank(sampler.bank_folder(trainer))
        distilled = distil(bank, self.rank, steps=self.steps, lr=self.lr, seed=self.seed)
        folder = bank.path.with_name("distilled")
        distilled.save(folder)
        for logger in trainer.loggers:
            log_artifact(logger, "distilled", "distilled-posterior", folder)
        posteriors: dict[str, Posterior] = {
            "SGLD": bank,
            "normal distribution": LowRankGaussian.fit(bank, self.gaussian_rank, "diagonal"),
            "APD": distilled,
        }
        network = nn.Sequential(OrderedDict(network=pl_module.new_network()))
        probs = {name: self._predict(each, network) for name, each in posteriors.items()}
        halves = bank.predict(network, grid()).chunk(2)
        errors = {
            "gaussian": entropy_error(probs["normal distribution"], probs["SGLD"]),
            "apd": entropy_error(probs["APD"], probs["SGLD"]),
            "halves": entropy_error(*halves),
        }
        self._log(trainer, errors, posterior_figure(probs, trainer.datamodule.points))  # type: ignore[attr-defined]

    def _predict(self, posterior: Posterior, network: nn.Module) -> Tensor:
        """Probabilities on the grid, shape (networks, inputs, 2)."""
        random = torch.Generator().manual_seed(self.seed)
        is_bank = isinstance(posterior, SampleBank)
        n = min(self.num_networks, len(posterior)) if is_bank else self.num_networks
        return posterior.predict(network, grid(), n, generator=random)

    def _log(self, trainer: Trainer, errors: Mapping[str, float], figure: Figure) -> None:
        metrics = {f"toy/entropy_error_{name}": value for name, value in errors.items()}
        rank_zero_info(f"PosteriorFigure: {metrics}")
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        for logger in figure_loggers(trainer):
            log_figure(logger, "toy/posterior", figure, trainer.global_step)
        if trainer.loggers:
            path = run_folder(trainer) / "posterior.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=80)


def grid(size: int = 61) -> Tensor:
    """Inputs at equal distances in the plane, row by row from below, shape (size * size, 2)."""
    places = torch.linspace(-EDGE, EDGE, size)
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def entropy_error(probs: Tensor, reference: Tensor) -> float:
    """Distance of two predictive entropies, in nats, mean over the inputs."""
    return float((predictive_entropy(probs) - predictive_entropy(reference)).abs().mean())


def posterior_figure(
    probs: Mapping[str, Tensor], points: Batch, num_boundaries: int = 30
) -> Figure:
    """Decision boundaries of single networks, and below the predictive entropy of all.

    Args:
        probs: of each column its name and probabilities on `grid()`, shape (networks, inputs, 2).
        points: those trained on.
        num_boundaries: so many networks are drawn, evenly spread.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(probs), 6.4), layout="constrained")
    rows = figure.subplots(2, len(probs), sharex=True, sharey=True, squeeze=False)
    for axes, below, (name, each) in zip(*rows, probs.items(), strict=True):
        size = math.isqrt(each.shape[1])
        places = torch.linspace(-EDGE, EDGE, size)
        for network in each[torch.linspace(0, len(each) - 1, num_boundaries).long()]:
            first = network[:, 0].view(size, size)
            axes.contour(places, places, first, [0.5], colors="tab:green", alpha=0.4)
        axes.set_title(name)
        entropy = predictive_entropy(each).view(size, size)
        drawn = below.pcolormesh(places, places, entropy, vmin=0, vmax=math.log(2))
        for panel in (axes, below):
            draw_points(panel, points)
    rows[0, 0].set_ylabel("decision boundaries")
    rows[1, 0].set_ylabel("predictive entropy")
    figure.colorbar(drawn, ax=rows[1, :], label="nats")
    return figure


def draw_points(axes: Axes, points: Batch) -> None:
    """Draw the points that were trained on, one colour for each class."""
    for label, colour in enumerate(("tab:blue", "tab:red")):
        x, y = points.images[points.labels == label].T
        axes.scatter(x, y, s=24, color=colour, edgecolor="white", zorder=2)
    axes.set_aspect("equal")
