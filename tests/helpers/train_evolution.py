"""Trains by evolution strategies: `... train_evolution DIR PROCESSES module|callback`."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_revflip.callbacks import EvolutionStrategies
from lightning_revflip.modules import EvolutionModule
from tests.helpers.models import quiet_trainer

SETTINGS: dict[str, Any] = {"sigma": 0.2, "population": 32, "base_perturbations": 2, "seed": 0}
"""The population of the tests."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loader(batch_size: int = 20) -> DataLoader:
    """40 points in three classes that a linear classifier tells apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch_size)


class Classifier(LightningModule):
    """An ordinary module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.5, momentum=0.9)


class WithLosses(Classifier):
    """Tells the losses of examples."""

    def per_example_loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")


def evolution_module(**settings: Any) -> EvolutionModule:
    optimizer = partial(SGD, lr=0.5, momentum=0.9)
    return EvolutionModule(network(), **{**SETTINGS, "optimizer": optimizer, **settings})


def train(folder: Path, processes: int, kind: str) -> LightningModule:
    """A few generations, of which every process reads all batches."""
    model = evolution_module() if kind == "module" else WithLosses()
    trainer = quiet_trainer(
        folder,
        callbacks=[] if kind == "module" else [EvolutionStrategies(**SETTINGS)],
        max_epochs=3,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        use_distributed_sampler=False,
    )
    trainer.fit(model, loader(), loader())
    return model


if __name__ == "__main__":
    folder, processes, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    trained = train(folder, processes, kind)
    if trained.global_rank == 0:
        torch.save(trained.network.state_dict(), folder / f"{processes}.pt")
