"""`LightningTraining`: models of active learning that a Trainer trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_revflip._generators import seed_generators
from lightning_revflip.applications.active_learning import Predictive


class LightningTraining:
    """Trains a new LightningModule from scratch whenever it is called, for `ActiveLearning`.

    Each call seeds the global random generators.

    Args:
        model: makes a module.
        loader: makes a data loader of inputs and labels, with the batches that the module takes.
        trainer: makes a Trainer whose files go to a folder.
        predictive: what is predicted after training, made of the Trainer, which has the trained
            module, and of a module as it was before, into which samples of weights can be put.
        folder: its subfolder `training` is emptied by each call, and given to `trainer`.

    Examples:
        >>> training = LightningTraining(
        ...     model=lambda: Classifier(image_shape=(1, 28, 28), num_classes=10),
        ...     loader=lambda x, y: DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True),
        ...     trainer=lambda folder: Trainer(
        ...         max_steps=2000,
        ...         default_root_dir=folder,
        ...         callbacks=[SGLDSampler(folder / "bank", num_data="auto")],
        ...     ),
        ...     predictive=lambda trainer, module: PosteriorPredictor(
        ...         SampleBank(Path(trainer.default_root_dir) / "bank"), module, n=50
        ...     ),
        ...     folder="runs/active",
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Callable[[], LightningModule],
        loader: Callable[[Tensor, Tensor], Any],
        trainer: Callable[[Path], Trainer],
        predictive: Callable[[Trainer, LightningModule], Predictive],
        folder: str | PathLike[str],
    ) -> None:
        self.model = model
        self.loader = loader
        self.trainer = trainer
        self.predictive = predictive
        self.folder = Path(folder) / "training"

    def __call__(self, inputs: Tensor, labels: Tensor, seed: int) -> Predictive:
        """Train on inputs (examples, ...) and labels (examples,), and return what to predict by.

        Args:
            inputs: of the labelled examples.
            labels: their classes.
            seed: of the initial weights, the training and the predictions, below 2^32.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        module = self._new_module(seed)
        trainer = self.trainer(self.folder)
        trainer.fit(module, self.loader(inputs, labels))
        return self.predictive(trainer, self._new_module(seed))

    def _new_module(self, seed: int) -> LightningModule:
        """A module, which has the same initial weights for the same seed."""
        seed_generators(seed)
        return self.model()
