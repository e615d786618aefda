"""`AnomalyDetection`: how well predictions give away images that are no digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_revflip.applications import detect_anomalies, read_images
from lightning_revflip.callbacks.run_folder import run_folder
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.outliers import Kind, available_kinds, find_outliers
from recipes.mnist.sources import Source, Sources


class AnomalyDetection(Callback):
    """Tells test images from other images when a test ends, by how uncertain predictions are.

    Of both sides `size` images are drawn. Scores are the predictive entropy, 1 - the largest
    probability and, of several networks, the mutual information and the variation ratio.

    **Logs** `anomaly/<source>/<kind>/auroc/<score>`. The whole tables, with the areas under
    precision-recall curves and the false positive rates, go to `anomaly.md` in the folder of the
    run, if it has a logger, and to the console.

    With several processes the first one does all of this. Nothing is written to a checkpoint, and
    nothing happens in other stages, or with `fast_dev_run`.

    Args:
        sources: whose predictions, see `recipes.mnist.sources.Sources`; None: all there are.
        kinds: of other images, see `recipes.mnist.outliers`; None: all that can be had.
        folders: folders or zip files of other images, white on black. They are made grey and of the
            size of the test images. The name of the folder is the name of the kind.
        size: images of each side.
        scale: factor of all images, of both sides, beside that of the data module. Networks are
            more certain of larger numbers, and with them everything changes: always give it with
            a figure.
        num_samples: passes, or networks, see `Sources`.
        bank: folder of the samples, see `Sources`.
        distilled: folder or file of the `DistilledPosterior`, see `Sources`.
        seed: of all that is drawn.

    Raises:
        ValueError: for arguments out of range; when a test starts, if it is not known where samples
            are; when it ends, see `Sources.predictors`.
        FileNotFoundError: when a test starts, if images are missing.
        TypeError: when a test starts, if it is not one of a `Classifier` on `HandwrittenDigits`.
    """

    def __init__(
        self,
        sources: list[Source] | None = None,
        kinds: list[Kind] | None = None,
        folders: Sequence[str] = (),
        size: int = 2000,
        scale: float = 1.0,
        num_samples: int = 200,
        bank: str | None = None,
        distilled: str | None = None,
        seed: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        self.sources = Sources(sources, num_samples, bank, distilled, seed)
        self.kinds = kinds
        self.folders = [Path(folder).expanduser() for folder in folders]
        self.size = size
        self.scale = scale
        self.seed = seed
        self.outliers: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "test":
            return
        check_task(self, trainer, pl_module)
        self.sources.check(trainer)
        self.outliers = self._find(trainer.datamodule)  # type: ignore[attr-defined]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not reports(trainer):
            return
        assert isinstance(pl_module, Classifier)
        data: HandwrittenDigits = trainer.datamodule  # type: ignore[attr-defined]
        tables = []
        for source, predictor in self.sources.predictors(trainer, pl_module).items():
            report = detect_anomalies(
                predictor,
                data.test_set().images,
                self.outliers,
                size=self.size,
                scale=self.scale,
                seed=self.seed,
                batch_size=data.eval_batch_size,
            )
            found = {k: v for k, v in report.metrics().items() if "/auroc/" in k}
            pl_module.log_dict(
                {f"anomaly/{source}/{k}": v for k, v in found.items()}, rank_zero_only=True
            )
            networks = f"{report.networks} network{'s' if report.networks > 1 else ''}"
            tables.append(f"## {source}: {networks}, inputs x{report.scale:g}\n\n{report.table()}")
        write_tables(trainer, "anomaly.md", tables)

    def _find(self, data: HandwrittenDigits) -> dict[str, Tensor]:
        """Other images by kind."""
        test = data.test_set().images
        shape, found = test.shape[1:], {}
        kinds = available_kinds(shape, data.root) if self.kinds is None else self.kinds
        for kind in kinds:
            description, found[str(kind)] = find_outliers(
                kind, test, data.scale, self.size, self.seed, data.root
            )
            rank_zero_info(f"Anomalies: {description}")
        for folder in self.folders:
            images = read_images(folder, shape, count=self.size, seed=self.seed)
            found[folder.stem] = images.mul_(data.scale)
            rank_zero_info(f"Anomalies: {len(images):,} images in {folder}")
        return found


def check_task(callback: Callback, trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise unless a test is one of the classifier and the data of this recipe."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(pl_module, Classifier) or not isinstance(data, HandwrittenDigits):
        raise TypeError(
            f"{type(callback).__name__} is about a Classifier on HandwrittenDigits, got "
            f"{type(pl_module).__name__} and {type(data).__name__}."
        )


def reports(trainer: Trainer) -> bool:
    """Whether this process reports."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def write_tables(trainer: Trainer, name: str, tables: list[str]) -> None:
    """Show tables, and write them to a file in the folder of a run that has a logger."""
    text = "\n\n".join(tables) + "\n"
    rank_zero_info(text)
    if trainer.loggers:
        path = run_folder(trainer) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
