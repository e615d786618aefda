"""What a translator says and looks at, for loggers that take text and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_revflip.callbacks.loggers import can_draw, log_figure, log_table, media_loggers
from recipes.nmt.batches import Batch, select
from recipes.nmt.data import ParallelText
from recipes.nmt.module import Translator
from recipes.nmt.record import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_figure(weights: Tensor, source: Sequence[str], target: Sequence[str]) -> Figure:
    """Heat map of attention: a row for each target token, a column for each source token.

    Args:
        weights: (target tokens, source tokens).
        source: the source tokens.
        target: the target tokens.

    Raises:
        ValueError: if there are not as many tokens as weights.
    """
    from matplotlib.figure import Figure

    if tuple(weights.shape) != (len(target), len(source)):
        raise ValueError(
            f"weights must have a row for each of the {len(target)} target tokens and a column for "
            f"each of the {len(source)} source tokens, got shape {tuple(weights.shape)}."
        )
    size = (2 + 0.3 * len(source), 1.5 + 0.25 * len(target))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(weights.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    # "$" would begin a formula.
    axes.set_xticks(range(len(source)), [t.replace("$", r"\$") for t in source], rotation=90)
    axes.set_yticks(range(len(target)), [t.replace("$", r"\$") for t in target])
    axes.set_xlabel("source")
    axes.set_ylabel("translation")
    return figure


class TranslationSamples(Callback):
    """Logs translations of some validation sentences, and what the first of them attended to.

    After every validation, for WandbLogger and TensorBoardLogger: `nmt/translations` (a table, or
    text) and `nmt/attention` (a heat map). Does nothing with another logger. The sentences are
    always the first of the batch in the middle, which is neither of short sentences nor of long
    ones. Without matplotlib there is a warning in place of the heat map.

    Args:
        count: number of sentences.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        self.count = count

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        loggers = media_loggers(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        middle = trainer.num_val_batches[dataloader_idx] // 2
        if batch_idx != middle or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if not loggers:
            return
        if not isinstance(pl_module, Translator) or not isinstance(data, ParallelText):
            raise TypeError(
                "TranslationSamples shows what a Translator does with a ParallelText, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )
        few = select(batch, range(min(self.count, len(batch.lines))))
        translations = [translation.tokens for translation in pl_module.translate(few)]
        weights = pl_module.attention_weights(few, translations)
        vocabulary, tokenizer = data.target_vocabulary, data.target_tokenizer
        words = [vocabulary.decode(tokens) for tokens in translations]
        rows = [
            [data.sources("val")[line], tokenizer.detokenize(found), data.references("val")[line]]
            for line, found in zip(few.lines, words, strict=True)
        ]
        source = [*data.source_tokenizer.tokenize(rows[0][0]), "<eos>"]
        for logger in loggers:
            log_table(logger, "nmt/translations", COLUMNS, rows, trainer.global_step)
            if words[0] and can_draw():
                figure = attention_figure(weights[0], source, words[0])
                log_figure(logger, "nmt/attention", figure, trainer.global_step)
