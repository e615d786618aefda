"""Trains a Bayesian regression in one or more processes: `python -m tests.helpers.train_flipout
DIR N`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from lightning_revflip.callbacks import Flipout
from tests.helpers.flipout import SEED, Regressor, loader
from tests.helpers.models import quiet_trainer


def train(folder: Path, processes: int) -> Regressor:
    """Steps on all 16 examples, divided among the processes."""
    seed_everything(SEED)
    model = Regressor()
    trainer = quiet_trainer(
        folder,
        callbacks=[Flipout()],
        max_epochs=3,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
    )
    trainer.fit(model, loader(16 // processes))
    return model


if __name__ == "__main__":
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    trained = train(folder, processes)
    torch.save(trained.state_dict(), folder / f"rank{trained.global_rank}.pt")
