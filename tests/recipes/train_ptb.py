"""Trains a language model in one or more processes.

python -m tests.recipes.train_ptb DIR PROCESSES MEMORY
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_revflip.callbacks import ReversibleRNN
from recipes.ptb.module import LanguageModel
from tests.recipes.random_text import VOCABULARY, RandomText, quiet_trainer


class Seed(Callback):
    """The same initial weights, whatever the strategy drew from the generator before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        seed_everything(3, verbose=False)


def train(folder: Path, processes: int, memory: str) -> LanguageModel:
    """One epoch without dropout, the columns divided among the processes."""
    seed_everything(3, verbose=False)
    model = LanguageModel(VOCABULARY, "lstm", 8, [12, 8], 0.0, 0.0, 0.0, 0.0, 0.0, memory=memory)
    trainer = quiet_trainer(
        folder,
        callbacks=[Seed(), ReversibleRNN()],
        max_epochs=1,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        precision="64-true",
    )
    trainer.fit(model, RandomText())
    return model


if __name__ == "__main__":
    folder, processes, memory = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    trained = train(folder, processes, memory)
    if trained.global_rank == 0:
        torch.save(trained.state_dict(), folder / f"{memory}{processes}.pt")
