"""A text of random words for the language model, and a Trainer that keeps quiet."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from recipes.ptb.data import Prompt
from recipes.ptb.streams import Windows, columns_of_rank, fixed_lengths, parallel_streams
from tests.helpers import models

VOCABULARY = 30


class RandomText(LightningDataModule):
    """Windows of a random text; lengths vary from epoch to epoch.

    Several processes read a share of the columns each.
    """

    def __init__(self, tokens: int = 241, batch: int = 4, bptt: int = 10) -> None:
        super().__init__()
        text = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(5))
        self.streams = parallel_streams(text, batch, keep_all=True)
        self.batch = batch
        self.bptt = bptt

    def _windows(self, bptt: int) -> Windows:
        columns = columns_of_rank(self.batch, self.trainer.global_rank, self.trainer.world_size)
        steps = len(self.streams.inputs)
        return Windows(self.streams.columns(columns), fixed_lengths(steps, bptt), bptt)

    def train_dataloader(self) -> Windows:
        windows = self._windows(self.bptt + self.trainer.current_epoch)
        windows.bptt = self.bptt
        return windows

    def val_dataloader(self) -> Windows:
        return self._windows(7)

    def test_dataloader(self) -> Windows:
        return self._windows(9)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([Prompt(self.streams.inputs[:5, :1], 4, 0.0)], batch_size=None)


def quiet_trainer(folder: Path, **kwargs: Any) -> Trainer:
    """A Trainer that prints nothing, for windows that are drawn anew in each epoch."""
    settings = {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0}
    return models.quiet_trainer(folder, **(settings | kwargs))
