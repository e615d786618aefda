"""Where a run keeps its files."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run, of which ModelCheckpoint by default uses the subfolder `checkpoints`."""
    logger = trainer.loggers[0]
    save_dir = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(save_dir, str(logger.name), version)
