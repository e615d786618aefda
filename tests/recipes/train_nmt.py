"""Trains a translator in one or more processes.

python -m tests.recipes.train_nmt DIR PROCESSES MEMORY
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_revflip.callbacks import ReversibleRNN
from recipes.nmt.data import ParallelText
from recipes.nmt.writer import TranslationWriter
from tests.helpers.models import quiet_trainer
from tests.recipes.small_nmt import small_model, write_text


class Seed(Callback):
    """The same initial weights, whatever the strategy drew from the generator before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        seed_everything(3, verbose=False)


def main(folder: Path, processes: int, memory: str) -> None:
    """Two epochs without dropout, every batch divided among the processes; then test and predict.

    Writes weights, scores and translations.
    """
    (folder / "input").write_text("eins zwei drei\nvier\n\nsechs fünf\nzwei zwei\n")
    data = ParallelText(
        **write_text(folder), batch_size=8, eval_batch_size=4, input=str(folder / "input")
    )
    seed_everything(3, verbose=False)
    model = small_model(memory, source_vocab_size=None, context="embedding", max_extra_length=4)
    output = folder / f"{memory}{processes}.txt"
    trainer = quiet_trainer(
        folder,
        callbacks=[Seed(), ReversibleRNN(), TranslationWriter(str(output), overwrite=True)],
        max_epochs=2,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        precision="64-true",
    )
    trainer.fit(model, data)
    scores = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if name != "train/loss"  # of the first process
    }
    scores |= trainer.test(model, data, verbose=False)[0]
    trainer.predict(model, data, return_predictions=False)
    if trainer.is_global_zero:
        result = {"weights": model.state_dict(), "scores": scores, "predicted": output.read_text()}
        torch.save(result, folder / f"{memory}{processes}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
