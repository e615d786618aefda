"""Active learning of digits: which images to label next, by what samples of the weights predict.

    python -m recipes.mnist.active_learning --config recipes/mnist/configs/apd_active_learning.yaml

Starts with two labels of each class, and labels ten more images in each round, for which a new
network is trained. Writes `state.json` and `accuracy.png` into the folder of the run; the same
command goes on after a run that was stopped.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_revflip.apd import distil
from lightning_revflip.applications import (
    ActiveLearning,
    DropoutPredictor,
    LightningTraining,
    NetworkPredictor,
    Pool,
    PosteriorPredictor,
    Predictor,
    Round,
)
from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.callbacks.loggers import can_draw
from lightning_revflip.posterior import SampleBank
from recipes.mnist.batches import Batches, DividedSampler
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PosteriorName = Literal["network", "dropout", "sgld", "apd"]


def run(
    data: HandwrittenDigits,
    posterior: PosteriorName = "apd",
    acquisition: str = "variation_ratio",
    rounds: int = 50,
    initial_per_class: int = 2,
    labels_per_round: int = 10,
    num_candidates: int | None = 2000,
    num_samples: int = 50,
    hidden: tuple[int, ...] = (100,),
    steps: int = 500,
    lr: float = 1.0,
    temperature: float = 0.001,
    prior_precision: float = 1.0,
    burn_in: int = 250,
    every_n_steps: int = 5,
    rank: int = 20,
    distillation_steps: int = 300,
    dropout: float = 0.0,
    seed: int = 0,
    folder: str = "runs/mnist_active_learning",
) -> list[Round]:
    """Label images of the training set round by round.

    Args:
        data: images; those of its training set are the pool, of which labels are asked for.
        posterior: what predicts: a `network`, or `num_samples` passes of one with `dropout`, or as
            many samples of `sgld`, or of the generator that is distilled from these (`apd`).
        acquisition: `random` or a name in `lightning_revflip.applications.ACQUISITIONS`.
        rounds: number of rounds.
        initial_per_class: number of labels of each class at the start.
        labels_per_round: number of images that are labelled after each round.
        num_candidates: so many images of the pool, drawn at random, can be picked; null: all.
        num_samples: of the weights.
        hidden: units of each hidden layer.
        steps: of training in each round.
        lr: learning rate.
        temperature: of the sampled posterior; training has no noise if none is sampled.
        prior_precision: 1 / variance of the prior over each weight.
        burn_in: steps before the first sample.
        every_n_steps: distance of samples in steps.
        rank: numbers of a code, of `apd`.
        distillation_steps: of the generator, of `apd`.
        dropout: probability with which a hidden unit is dropped.
        seed: of all rounds.
        folder: of the run.

    Returns:
        The rounds, with accuracies at the end of training: on the images for validation, by which
        settings may be chosen (10,000 of MNIST, 300 of the small digits), and on those of the test.
    """
    for stage in ("fit", "test"):
        data.setup(stage)
    pool, validation, test = (
        (each.images, each.labels)
        for each in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    if posterior == "dropout" and dropout == 0:
        raise ValueError("posterior 'dropout' needs a network with dropout: set it to 0.5, say.")
    collected = max(0, steps - burn_in) // every_n_steps
    if posterior == "apd" and not rank < collected:
        raise ValueError(
            f"rank={rank} needs more than {rank} samples, and a round collects {collected}: "
            f"(steps={steps} - burn_in={burn_in}) / every_n_steps={every_n_steps}. Choose a "
            "smaller rank, or collect more."
        )
    if posterior == "sgld" and num_samples > collected:
        raise ValueError(
            f"num_samples={num_samples} of sgld cannot be drawn from the {collected} that a round "
            f"collects: (steps={steps} - burn_in={burn_in}) / every_n_steps={every_n_steps}. "
            "Choose fewer, or collect more."
        )

    def model() -> LightningModule:
        return Classifier(
            data.image_shape,
            data.num_classes,
            hidden=hidden,
            dropout=dropout,
            optimizer="sgd",
            lr=lr,
        )

    def loader(images: Tensor, labels: Tensor) -> Batches:
        sampler = DividedSampler(len(images), data.batch_size, train=True, seed=seed)
        return Batches(images, labels, sampler)

    def trainer(folder: Path) -> Trainer:
        sampler = SGLDSampler(
            folder / "bank",
            num_data="auto",
            temperature=temperature,
            prior_precision=prior_precision,
            burn_in=burn_in,
            every_n_steps=every_n_steps,
            max_samples=None,
        )
        return Trainer(
            accelerator="cpu",  # as fast as a GPU for such a network
            max_epochs=-1,
            max_steps=steps,
            default_root_dir=folder,
            callbacks=[sampler] if posterior in ("sgld", "apd") else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def predictive(trainer: Trainer, module: LightningModule) -> Predictor:
        if posterior == "network":
            return NetworkPredictor(trainer.lightning_module)
        if posterior == "dropout":
            return DropoutPredictor(trainer.lightning_module, num_samples)
        bank = SampleBank(Path(trainer.default_root_dir) / "bank")
        if posterior == "sgld":
            return PosteriorPredictor(bank, module, num_samples)
        distilled = distil(bank, rank, steps=distillation_steps, seed=seed)
        random = torch.Generator().manual_seed(seed)
        return PosteriorPredictor(distilled, module, num_samples, generator=random)

    learning = ActiveLearning(
        LightningTraining(model, loader, trainer, predictive, folder),
        *pool,
        Pool.balanced(pool[1], initial_per_class, torch.Generator().manual_seed(seed)),
        acquisition=acquisition,
        labels_per_round=labels_per_round,
        num_candidates=num_candidates,
        evaluate={"validation": validation, "test": test},
        seed=seed,
        path=Path(folder) / "state.json",
    )
    learning.run(rounds, report=show)
    if can_draw():
        figure = accuracy_figure({acquisition: [learning.rounds]})
        figure.savefig(Path(folder) / "accuracy.png", dpi=100)
    return learning.rounds


def show(found: Round) -> None:
    """Print what a round found."""
    accuracy = ", ".join(f"{name} {value:.2%}" for name, value in found.accuracy.items())
    print(f"{found.num_labelled} labels: accuracy {accuracy}", flush=True)


def accuracy_figure(runs: Mapping[str, Sequence[Sequence[Round]]]) -> Figure:
    """Test accuracy over the number of labels.

    Args:
        runs: of each name the rounds of some runs, of which mean and standard deviation are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, several in runs.items():
        labels = [each.num_labelled for each in several[0] if each.accuracy]
        accuracy = torch.tensor(
            [[each.accuracy["test"] for each in rounds if each.accuracy] for rounds in several]
        )
        mean = accuracy.mean(0)
        (line,) = axes.plot(labels, mean.tolist(), label=name)
        if len(accuracy) > 1:
            std = accuracy.std(0)
            low, high = (mean - std).tolist(), (mean + std).tolist()
            axes.fill_between(labels, low, high, alpha=0.2, color=line.get_color())
    axes.set_xlabel("labels")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Run as the command line and its configuration say."""
    # What a Trainer tells at each start, and SGLDSampler at each end, is too much for 50 rounds.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "You defined a `validation_step`")
    auto_cli(run, as_positional=False)


if __name__ == "__main__":
    main()
