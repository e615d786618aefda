"""What `revflip predict` writes: one translation per line of the input, in its order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer


class Translated(NamedTuple):
    """What `predict_step` returns, and `test_step` as a dict.

    Attributes:
        lines: places of the sentences in the data module's `input_lines`, or in the text of the
            test, counted from 0.
        texts: their translations.
    """

    lines: tuple[int, ...]
    texts: list[str]


class TranslationWriter(Callback):
    """Collects the translations of a prediction, and writes or prints one for each input line.

    Sentences may be translated in any order, in any batches and in several processes: the output
    has the order of the data module's `input_lines` (a list, known after its `setup`). A line break
    within a translation becomes a space. The file is UTF-8 with "\\n" after every line, written by
    the first process when all translations are there; an interrupted prediction leaves no file.
    Nothing is written to a checkpoint, and nothing happens in other stages than `predict`.

    Args:
        path: the file to write, whose folder is made if need be; None prints.
        overwrite: replace the file if it exists.

    Raises:
        FileExistsError: before the first batch, if the file exists and may not be replaced.
        TypeError: if the model predicts something else than `Translated`, or the data module has no
            list `input_lines`.
        ValueError: if a prediction has not as many texts as lines.
        RuntimeError: if a line has no translation or several.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        # Through links, so that a link is kept and the file that it names is replaced.
        self.path = None if path is None else Path(path).expanduser().resolve()
        self.overwrite = overwrite
        self._expected = 0
        self._collected: list[tuple[int, str]] = []
        self._written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        lines = getattr(data, "input_lines", None)
        if not isinstance(lines, list):
            raise TypeError(
                "TranslationWriter needs a data module with a list `input_lines` after its setup, "
                f"got {type(data).__name__} with {type(lines).__name__}."
            )
        if self.path is not None:
            # The first process looks for all, so that none waits for one that stopped.
            exists = trainer.strategy.broadcast(self.path.exists())
            regular = trainer.strategy.broadcast(self.path.is_file())
            if exists and not (self.overwrite and regular):
                raise FileExistsError(
                    f"{self.path} exists"
                    + (" and is not a file. " if not regular else ". ")
                    + "Give TranslationWriter another path"
                    + (
                        ", or overwrite=True (--trainer.callbacks.overwrite=true) to replace it."
                        if regular
                        else "."
                    )
                )
            if trainer.is_global_zero:
                self.path.parent.mkdir(parents=True, exist_ok=True)
        elif trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()  # it would stand among the translations
        self._expected = len(lines)
        self._collected = []
        self._written = False

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, Translated):
            raise TypeError(
                "TranslationWriter writes predictions of type Translated, got predictions of type "
                f"{type(outputs).__name__} from {type(pl_module).__name__}."
            )
        if len(outputs.lines) != len(outputs.texts):
            raise ValueError(
                "Translated must have one text for each line, got "
                f"{len(outputs.lines)} lines and {len(outputs.texts)} texts."
            )
        self._collected += zip(outputs.lines, outputs.texts, strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Without a batch, Lightning calls no hook of prediction between `setup` and this one.
        if stage == "predict" and not self._written:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        texts = in_order(of_all_processes(self._collected), self._expected)
        self._written = True
        if not trainer.is_global_zero:
            return
        content = "".join(f"{text}\n" for text in texts)
        if self.path is None:
            print(content, end="")
        else:
            write_atomically(self.path, content)


def in_order(translations: list[tuple[int, str]], count: int) -> list[str]:
    """Sort translations by their lines, and put each on one line.

    Args:
        translations: line, counted from 0, and text.
        count: number of lines.

    Raises:
        RuntimeError: unless each of the lines 0 to `count` - 1 comes exactly once.

    >>> in_order([(1, "b"), (0, "a\\na")], 2)
    ['a a', 'b']
    """
    texts: dict[int, str] = {}
    for line, text in translations:
        if line in texts:
            raise RuntimeError(
                f"Line {line} (counted from 0) was translated twice. Every line must come from one "
                "batch of one process: in several processes use a sampler that repeats none."
            )
        texts[line] = " ".join(text.splitlines())
    missing = [line for line in range(count) if line not in texts]
    if missing:
        raise RuntimeError(
            f"Line {missing[0]} (counted from 0) has no translation; {len(missing)} of {count} "
            "lines have none. Predict all batches: leave limit_predict_batches and fast_dev_run "
            "at their defaults."
        )
    if len(texts) > count:
        raise RuntimeError(
            f"Line {max(texts)} (counted from 0) was translated, but the input has {count} lines."
        )
    return [texts[line] for line in range(count)]


def write_atomically(path: Path, content: str) -> None:
    """Write a file beside its place and move it there, so that it is never seen half written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(content, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def of_all_processes(translations: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """What all processes have translated, in each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return translations
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, translations)
    return [translation for part in parts for translation in part]
