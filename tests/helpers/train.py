"""Trains a converted model in one or more processes: `python -m tests.helpers.train DIR N`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_revflip.callbacks import ReversibleRNN
from tests.helpers.models import Tagger, loader, quiet_trainer


class Seed(Callback):
    """The same initial weights, whatever the strategy drew from the generator before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        seed_everything(3)


def train(folder: Path, processes: int) -> LightningModule:
    """One batch of all sequences, divided among the processes."""
    seed_everything(3)
    model = Tagger().double()
    trainer = quiet_trainer(
        folder,
        callbacks=[Seed(), ReversibleRNN()],
        max_epochs=6,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        precision="64-true",
    )
    trainer.fit(model, loader(16 // processes))
    return model


if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    trained = train(folder, processes)
    if trained.global_rank == 0:
        torch.save(trained.state_dict(), folder / f"{processes}.pt")
