"""What a translator says and looks at, for loggers that take text and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from recipes.common.figures import WITH_FIGURES, log_figure
from recipes.nmt.batches import Batch
from recipes.nmt.data import ParallelText
from recipes.nmt.module import Translator
from recipes.nmt.vocabulary import END

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ["source", "translation", "reference"]


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
    always the first of the first batch. Needs matplotlib.

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
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WITH_FIGURES)]
        data = trainer.datamodule  # type: ignore[attr-defined]
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero or not loggers:
            return
        if not isinstance(pl_module, Translator) or not isinstance(data, ParallelText):
            raise TypeError(
                "TranslationSamples shows what a Translator does with a ParallelText, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )
        few = first_sentences(batch, self.count)
        translations = [translation.tokens for translation in pl_module.translate(few)]
        weights = pl_module.attention_weights(few, translations)
        rows = [
            [
                data.source_tokenizer.detokenize(sentence(few.source, column, data, source=True)),
                data.target_tokenizer.detokenize(data.target_vocabulary.decode(tokens)),
                data.references("val")[line],
            ]
            for column, (tokens, line) in enumerate(zip(translations, few.lines, strict=True))
        ]
        target = data.target_vocabulary.decode(translations[0])
        source = [*sentence(few.source, 0, data, source=True), "<eos>"]
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("nmt/translations", COLUMNS, rows, step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                text = "\n".join(" | ".join(row) for row in [COLUMNS, ["---"] * 3, *rows])
                logger.experiment.add_text("nmt/translations", text, trainer.global_step)
            if target:
                figure = attention_figure(weights[0], source, target)
                log_figure(logger, "nmt/attention", figure, trainer.global_step)


def first_sentences(batch: Batch, count: int) -> Batch:
    """The first sentences of a batch."""
    source_lengths, target_lengths = batch.source_lengths[:count], batch.target_lengths[:count]
    target = (slice(0, max(target_lengths)), slice(0, count))
    return Batch(
        batch.source[: max(source_lengths), :count],
        source_lengths,
        batch.target_inputs[target],
        batch.targets[target],
        target_lengths,
        batch.lines[:count],
    )


def sentence(tokens: Tensor, column: int, data: ParallelText, *, source: bool) -> list[str]:
    """The words of a column of a batch, without the end."""
    vocabulary = data.source_vocabulary if source else data.target_vocabulary
    numbers = tokens[:, column].tolist()
    return vocabulary.decode(numbers[: numbers.index(END)])
