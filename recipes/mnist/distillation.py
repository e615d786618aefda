"""`SaveDistilled`: keeps what an `APDModule` has learnt where a test of the network finds it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_revflip.callbacks.loggers import log_artifact
from lightning_revflip.modules import APDModule, SampleBankCodes


class SaveDistilled(Callback):
    """Saves the `DistilledPosterior` of an `APDModule` when training ends.

    What was saved there is replaced. WandbLogger gets it as the artifact `distilled-<run>`. Nothing
    is written to a checkpoint, and nothing happens with `fast_dev_run`.

    Args:
        dirpath: folder. None: `distilled` beside the bank, where `UncertaintyReport` and the
            applications look for it.

    Raises:
        TypeError: at the start, unless an `APDModule` is trained on `SampleBankCodes`.
        FileExistsError: at the end, if the folder holds other files.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, APDModule) or not isinstance(data, SampleBankCodes):
            raise TypeError(
                "SaveDistilled is about an APDModule on SampleBankCodes, got "
                f"{type(pl_module).__name__} and {type(data).__name__}."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, APDModule)
        posterior, folder = pl_module.posterior(), self._folder(trainer)
        posterior.save(folder)
        for logger in trainer.loggers:
            log_artifact(logger, "distilled", "distilled-posterior", folder)
        rank_zero_info(f"SaveDistilled: {posterior!r}, {posterior.nbytes:,} bytes in {folder}")

    def _folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath).expanduser()
        data: SampleBankCodes = trainer.datamodule  # type: ignore[attr-defined]
        return Path(data.bank.path).with_name("distilled")
