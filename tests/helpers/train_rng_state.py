"""Resumes with RNGState in two processes: `python -m tests.helpers.train_rng_state DIR`.

Each process draws numbers of its own, and writes its weights and what its generators draw next.
"""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_revflip._generators import seed_generators
from lightning_revflip.callbacks.rng_state import RNGState
from tests.helpers.models import quiet_trainer
from tests.helpers.random_models import NoisyRegressor, flat_weights, loader


class OwnNumbers(Callback):
    """Seeds each process differently."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        seed_generators(self.seed + trainer.global_rank)


def train(
    folder: Path, epochs: int, seed: int = 0, ckpt_path: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Train, and save a checkpoint of the end; the rank, and what it found."""
    torch.manual_seed(0)
    model = NoisyRegressor()
    callbacks = [OwnNumbers(seed), RNGState()]
    trainer = quiet_trainer(
        folder, callbacks=callbacks, max_epochs=epochs, strategy="ddp", devices=2
    )
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"epochs{epochs}.ckpt")
    draws = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
    return trainer.global_rank, {"weights": flat_weights(model), "next": draws}


def main(folder: Path) -> None:
    rank, whole = train(folder, epochs=4)
    train(folder, epochs=2)
    _, resumed = train(folder, epochs=4, seed=100, ckpt_path=folder / "epochs2.ckpt")
    torch.save({"whole": whole, "resumed": resumed}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
