"""What a test translated, for reading it and for comparing runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_revflip.callbacks.loggers import log_artifact
from lightning_revflip.callbacks.run_folder import run_folder
from recipes.nmt.data import ParallelText
from recipes.nmt.module import Translator
from recipes.nmt.writer import Translated, of_all_processes, write_atomically

COLUMNS = ("source", "translation", "reference")


class TranslationRecord(Callback):
    """Writes the translations of a test to `translations.tsv` in the folder of the run.

    Below a header there is a line for each sentence, in the order of the test: source, translation
    and reference, the latter two as BLEU compares them. WandbLogger gets the file as the artifact
    `translations-<run>`. The first of several processes writes what all of them translated. Nothing
    happens in other stages, in a run without a logger and with `fast_dev_run`.
    """

    def __init__(self) -> None:
        self._collected: list[tuple[int, str]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collected = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, Translator) or not isinstance(data, ParallelText):
            raise TypeError(
                "TranslationRecord keeps what a Translator makes of a ParallelText, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )
        translated = Translated(**outputs)
        self._collected += zip(translated.lines, translated.texts, strict=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        texts = dict(of_all_processes(self._collected))
        if not trainer.is_global_zero:
            return
        data: ParallelText = trainer.datamodule  # type: ignore[attr-defined]
        sources, references = data.sources("test"), data.references("test")
        rows = [(sources[line], texts[line], references[line]) for line in sorted(texts)]
        path = run_folder(trainer) / "translations.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_tsv([COLUMNS, *rows]))
        for logger in trainer.loggers:
            log_artifact(logger, "translations", "translations", path)


def as_tsv(rows: list[tuple[str, ...]]) -> str:
    """Cells with tabs between them, a row on a line.

    >>> as_tsv([("a b", "a\\tb"), ("a\\nb", "")])
    'a b\\ta b\\na b\\t\\n'
    """
    cells = ([" ".join(cell.replace("\t", " ").splitlines()) for cell in row] for row in rows)
    return "".join("\t".join(row) + "\n" for row in cells)
