"""What `revflip predict` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.ptb.data import PennTreebank, Prompt
from recipes.ptb.module import Continuation


class TextWriter(Callback):
    """Prints the text of every prediction, and the perplexity that the model gives it.

    Args:
        path: file to append the texts to; None prints only.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Prompt,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(outputs, Continuation) or not isinstance(data, PennTreebank):
            raise TypeError(
                "TextWriter writes what LanguageModel predicts for PennTreebank, got predictions "
                f"of type {type(outputs).__name__} for {type(data).__name__}."
            )
        if not trainer.is_global_zero:
            return
        text = data.vocabulary.decode(outputs.tokens).strip("\n")
        perplexity = (-outputs.log_probs.mean()).exp().item()
        report = f"{text}\n(perplexity {perplexity:.1f})\n"
        print(report)
        if self.path is not None:
            with Path(self.path).open("a", encoding="utf-8") as file:
                print(report, file=file)
