"""Trains independent chains in two processes: `python -m tests.helpers.train_chains DIR [RANK]`.

Each process writes what it found; with RANK, that process fails in the middle.
"""

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_revflip.callbacks.rng_state import RNGState
from lightning_revflip.strategies import IndependentChainsStrategy
from recipes.mnist.batches import Batch
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from tests.helpers.models import quiet_trainer
from tests.helpers.random_models import NoisyRegressor, flat_weights, loader

SEED = 3
CHAINS = 2


class Digits(Classifier):
    """Makes its layers in `configure_model`, and remembers which images it read."""

    def __init__(self) -> None:
        super().__init__(hidden=(16,), optimizer="sgd", lr=0.1)
        self.read: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.read += batch.images.flatten(1).double().sum(1).tolist()
        return super().training_step(batch, batch_idx)


class Failing(NoisyRegressor):
    """Fails in one process, in its second epoch."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == self.rank and self.global_step == 8:
            raise RuntimeError("this chain has failed")
        return super().training_step(batch, batch_idx)


def chains(different_init: bool = True) -> dict[str, Any]:
    """Settings of a Trainer."""
    return {"strategy": IndependentChainsStrategy(different_init), "devices": CHAINS}


def regress(
    folder: Path, epochs: int = 4, seed: int = SEED, ckpt_path: Path | None = None, **settings: Any
) -> tuple[LightningModule, Trainer]:
    """Train a model that has its weights from the start."""
    seed_everything(seed)
    model = NoisyRegressor()
    # The best is named by a value that differs between the chains.
    best = ModelCheckpoint(folder, "{epoch}-{own_loss:.4f}", "own_loss")
    callbacks = [RNGState(), best, ModelCheckpoint(folder, "end")]
    trainer = quiet_trainer(
        folder, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, **settings
    )
    trainer.fit(model, loader(), loader(shuffle=False), ckpt_path=ckpt_path)
    return model, trainer


def classify(folder: Path, seed: int = SEED, **settings: Any) -> tuple[LightningModule, Trainer]:
    """Train a model whose weights are drawn in `configure_model`."""
    seed_everything(seed)
    model = Digits()
    trainer = quiet_trainer(folder, max_epochs=2, **settings)
    trainer.fit(model, HandwrittenDigits(source="digits", batch_size=128))
    return model, trainer


def found_by(model: LightningModule, trainer: Trainer) -> dict[str, Any]:
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {"weights": flat_weights(model), "read": model.read, "metrics": metrics}


def error_of(folder: Path) -> str:
    """What a run says that resumes from a checkpoint with a fault."""
    try:
        regress(folder, ckpt_path=folder / "end.ckpt", **chains())
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    model, trainer = regress(folder / "whole", **chains())
    found["whole"] = found_by(model, trainer)
    trainer.test(model, loader(shuffle=False), verbose=False)
    found["tested"] = found_by(model, trainer)
    best = trainer.test(model, loader(shuffle=False), ckpt_path="best", verbose=False)
    found["best"] = {"weights": flat_weights(model), "test_loss": best[0]["test_loss"]}

    regress(folder / "early", epochs=1, **chains())
    model, trainer = regress(folder / "half", epochs=2, **chains())
    resumed = regress(folder / "half", ckpt_path=folder / "half" / "end.ckpt", seed=9, **chains())
    found["resumed"] = found_by(*resumed)

    other_step = folder / "half" / "chain-0001" / "end.ckpt"
    if trainer.is_global_zero:
        shutil.copy(folder / "early" / "chain-0001" / "end.ckpt", other_step)
    trainer.strategy.barrier()
    found["at_other_step"] = error_of(folder / "half")
    if trainer.is_global_zero:
        other_step.unlink()
    trainer.strategy.barrier()
    found["missing"] = error_of(folder / "half")

    found["digits"] = found_by(*classify(folder / "digits", **chains(different_init=False)))
    for different_init in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seed_everything(SEED)
            model = NoisyRegressor()
            trainer = quiet_trainer(folder, max_epochs=0, **chains(different_init))
            trainer.validate(model, loader(shuffle=False), verbose=False)
            trainer.fit(model, loader())
        texts = [str(warning.message) for warning in caught]
        found[f"different_init={different_init}"] = {
            "weights": flat_weights(model),
            "warned": any("start from the same weights" in text for text in texts),
        }
    torch.save(found, folder / f"chain{trainer.global_rank}.pt")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        folder, rank = Path(sys.argv[1]), int(sys.argv[2])
        quiet_trainer(folder, max_epochs=4, **chains()).fit(Failing(rank), loader())
