"""Small ordinary modules and their data, for the compatibility matrix."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_revflip.apd import ParameterCodec
from lightning_revflip.modules import APDModule, EvolutionModule, SampleBankCodes
from lightning_revflip.posterior import SampleBank
from tests.helpers.distilled import normal_rows, small_apd, write_bank

EXAMPLES = 16
BATCH = 4
LR = 0.1


class Sequences(LightningModule):
    """Classifies short sequences of points; knows nothing of this package."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lr = LR
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.rnn(x)[0][:, -1]))

    def per_example_loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.per_example_loss(batch).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.per_example_loss(batch).mean(), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.per_example_loss(batch).mean(), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), self.lr)


class Manual(Sequences):
    """Steps the optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.per_example_loss(batch).mean())
        for optimizer in optimizers:
            optimizer.step()


class SeveralOptimizers(Manual):
    """Has an optimizer for each of its layers."""

    def configure_optimizers(self) -> Any:
        return [SGD(part.parameters(), self.lr) for part in (self.rnn, self.head)]


class Late(Sequences):
    """Makes its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = None, None

    def configure_model(self) -> None:
        if self.rnn is None:
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)


class Data(LightningDataModule):
    """The same sequences in all stages; their class is the sign of their last number.

    Args:
        batch_size: of all stages.
        shuffle: in training.
        seed: of the order that Lightning gives to several processes, for a single one.
    """

    def __init__(
        self, batch_size: int = BATCH, shuffle: bool = False, seed: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        x = torch.randn(EXAMPLES, 5, 3, generator=torch.Generator().manual_seed(0))
        self.examples = TensorDataset(x, (x[:, -1, 0] > 0).long())

    def train_dataloader(self) -> DataLoader:
        if self.seed is not None:
            sampler = DistributedSampler(self.examples, 1, 0, seed=self.seed)
            return DataLoader(self.examples, batch_size=self.batch_size, sampler=sampler)
        return DataLoader(self.examples, batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.examples, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def codes(folder: Path) -> SampleBankCodes:
    """Batches of codes of a bank, which each process writes at its first call."""
    path = folder / f"codes{os.environ.get('LOCAL_RANK', '0')}"
    bank = SampleBank(path) if path.exists() else write_bank(path, normal_rows(40)[0])
    codec = ParameterCodec.fit(bank, rank=2, residual="diagonal", dtype=torch.float32)
    return SampleBankCodes(bank, codec, batch_size=8, holdout=0.2, batches_per_epoch=4)


def distilling(folder: Path) -> APDModule:
    return small_apd(codes(folder).codec, hidden=(8,), critic_steps=1)


def evolving(folder: Path) -> EvolutionModule:
    optimizer = functools.partial(SGD, lr=LR)
    return EvolutionModule(LastState(), 0.1, 8, optimizer=optimizer)


class LastState(nn.Module):
    """The network of `Sequences`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Compiled(Sequences):
    """Compiles its last layer when training begins, whatever the layer has become."""

    def on_fit_start(self) -> None:
        self.head.compile(backend="aot_eager")
