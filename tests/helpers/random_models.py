"""A network whose training draws from all generators, and data that are shuffled by them."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

POINTS = 24


class NoisyRegressor(LightningModule):
    """Dropout, and noise of Python's and NumPy's generators; remembers which points it read."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.read: list[list[int]] = []

    def loss(self, points: Tensor) -> Tensor:
        return F.mse_loss(self.net(points[:, :2]), points[:, 1:2])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        points, numbers = batch
        self.read.append(numbers.tolist())
        return self.loss(points) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.loss(batch[0])
        self.log("val_loss", loss, sync_dist=True)
        self.log("own_loss", loss)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def points() -> Dataset:
    """Points and their numbers."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(POINTS, 2, generator=generator), torch.arange(POINTS))


def loader(shuffle: bool = True) -> DataLoader:
    """Six batches."""
    return DataLoader(points(), batch_size=4, shuffle=shuffle)


def flat_weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()
