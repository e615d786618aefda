"""Ordinary LightningModules that know nothing of this package, and data for them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

TOKENS = 11


class Tagger(LightningModule):
    """Predicts the next token of short sequences, batch first."""

    def __init__(self, rnn: str = "LSTM", hidden_size: int = 12, clip: float | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.rnn = getattr(nn, rnn)(8, hidden_size, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden_size, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).argmax(dim=-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class LateTagger(Tagger):
    """Makes its recurrent layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.rnn
        self.rnn = None

    def configure_model(self) -> None:
        if self.rnn is None:
            self.rnn = nn.LSTM(8, 12, num_layers=2, batch_first=True)


class SetupTagger(Tagger):
    """Makes its recurrent layers in its own `setup`."""

    def __init__(self) -> None:
        super().__init__()
        del self.rnn

    def setup(self, stage: str) -> None:
        if not hasattr(self, "rnn"):
            self.rnn = nn.LSTM(8, 12, num_layers=2, batch_first=True)


def tokens(sequences: int = 16, length: int = 10) -> Tensor:
    """Sequences that count upwards from a random start: a task that can be learnt."""
    start = torch.randint(TOKENS, (sequences, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(length)) % TOKENS


def loader(batch_size: int = 4, sequences: int = 16) -> DataLoader:
    return DataLoader(tokens(sequences), batch_size=batch_size)


def quiet_trainer(folder: Path, **kwargs: object) -> Trainer:
    """A Trainer on the CPU that prints and logs nothing unless told."""
    settings = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**(settings | kwargs))
