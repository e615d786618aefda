"""A small ordinary classifier, its data, and the loop that a `SGLDSampler` run must equal."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_revflip.callbacks import SGLDSampler
from tests.helpers.models import quiet_trainer

POINTS = 24
BATCH = 4
"""Six batches in an epoch."""
CLASSES = 3
LR = 0.1


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=LR)


class Blobs(LightningModule):
    """Classifies points; knows nothing of samplers.

    Args:
        configure: makes what `configure_optimizers` returns.
        layers: between the input and the output layer.
    """

    def __init__(self, configure: Callable[[Any], Any] = sgd, *layers: nn.Module) -> None:
        super().__init__()
        self.configure = configure
        self.net = nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: list[Tensor], stage: str) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log(f"{stage}_accuracy", self.accuracy)
        self.log(f"{stage}_nll", F.cross_entropy(logits, batch[1]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def data(size: int = POINTS) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + 0.5 * x[:, 3:]).argmax(1))


def loader(size: int = POINTS, batch_size: int = BATCH, shuffle: bool = False) -> DataLoader:
    return DataLoader(data(size), batch_size, shuffle=shuffle)


def blobs(*args: Any, seed: int = 0) -> Blobs:
    torch.manual_seed(seed)
    return Blobs(*args)


def sampler(folder: Path, **changes: Any) -> SGLDSampler:
    """One that collects every second step after four, in full precision."""
    usual = {
        "num_data": POINTS,
        "burn_in": 4,
        "every_n_steps": 2,
        "max_samples": None,
        "dtype": "float32",
        "seed": 7,
    }
    return SGLDSampler(folder / "bank", **usual | changes)


def fit(
    folder: Path,
    *callbacks: Any,
    model: LightningModule | None = None,
    epochs: int = 2,
    shuffle: bool = False,
    validate: bool = False,
    ckpt: Any = None,
    train: DataLoader | None = None,
    **settings: Any,
) -> tuple[LightningModule, Trainer]:
    """Train; the global generator starts from another state where a run is resumed."""
    model = blobs() if model is None else model
    seed_everything(99 if ckpt else 5)
    trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=epochs, **settings)
    trainer.fit(
        model,
        loader(shuffle=shuffle) if train is None else train,
        loader(12) if validate else None,
        ckpt_path=ckpt,
    )
    return model, trainer


def steps_by_hand(
    module: Blobs, optimizer: torch.optim.Optimizer, epochs: int, on_epoch_end: Any = None
) -> Iterator[int]:
    """Plain torch: train, and yield the number of each step after it was taken."""
    module.train()
    step = 0
    for _ in range(epochs):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            step += 1
            yield step
        if on_epoch_end is not None:
            on_epoch_end()


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def of_chain(bank: Any, chain: int) -> Tensor:
    """The rows of one chain of a bank."""
    counts = [len(steps) for steps in bank.steps.values()]
    return torch.split(bank.rows(), counts)[list(bank.chains).index(chain)]
