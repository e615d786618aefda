"""Trains with SGLDSampler in processes of their own: `python -m tests.helpers.train_sampler ...`.

endless DIR             one process that trains, writes a checkpoint after each epoch, and says
                        so on the standard output, until it is killed
ddp DIR                 two processes that hold one chain
independent DIR         two processes with a chain each, also stopped and resumed
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_revflip.callbacks import RNGState
from lightning_revflip.posterior import SampleBank
from lightning_revflip.strategies import IndependentChainsStrategy
from tests.helpers.models import quiet_trainer
from tests.helpers.sampled_models import Blobs, blobs, fit, loader, sampler, weights

SEED = 3


class SayEpoch(Callback):
    """Prints the number of epochs once the checkpoint of each is there."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(trainer.current_epoch, flush=True)


def endless(folder: Path) -> None:
    keep = ModelCheckpoint(folder / "kept", "{epoch}", save_top_k=-1)
    callbacks = [sampler(folder, max_samples=8), RNGState(), SayEpoch(), keep]
    fit(folder, *callbacks, epochs=-1, shuffle=True, enable_checkpointing=True)


def ddp(folder: Path) -> None:
    """Each process sees half of a batch of 8."""
    callback = sampler(folder, seed=None)
    model = blobs()
    seed_everything(5)
    trainer = quiet_trainer(folder, callbacks=[callback], max_epochs=4, strategy="ddp", devices=2)
    trainer.fit(model, loader(batch_size=4), loader(12))
    found = {
        "weights": weights(model),
        "metrics": {name: float(each) for name, each in trainer.callback_metrics.items()},
        "steps": callback.steps,
    }
    torch.save(found, folder / f"{trainer.global_rank}.pt")


def independent_run(
    folder: Path, epochs: int, seed: int = SEED, ckpt: Path | None = None, **settings: Any
) -> tuple[LightningModule, Trainer]:
    seed_everything(seed)
    callbacks = [sampler(folder, seed=None), RNGState()]
    trainer = quiet_trainer(folder, callbacks=callbacks, max_epochs=epochs, **settings)
    model = Blobs()
    trainer.fit(model, loader(shuffle=True), loader(12), ckpt_path=ckpt)
    return model, trainer


def independent(folder: Path) -> None:
    settings: dict[str, Any] = {"devices": 2}

    def run(name: str, epochs: int, **more: Any) -> tuple[LightningModule, Trainer]:
        strategy = IndependentChainsStrategy(different_init=True)
        return independent_run(folder / name, epochs, strategy=strategy, **settings, **more)

    model, trainer = run("whole", 4)
    found = {"weights": weights(model), "nll": float(trainer.callback_metrics["val_nll"])}
    (tested,) = trainer.test(model, loader(12), verbose=False)
    found["tested"] = tested
    _, trainer = run("resumed", 2)
    trainer.save_checkpoint(folder / "resumed" / "two.ckpt")
    run("resumed", 4, seed=9, ckpt=folder / "resumed" / "two.ckpt")
    found["samples"] = len(SampleBank(folder / "resumed" / "bank", chains=[trainer.global_rank]))
    torch.save(found, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    {"endless": endless, "ddp": ddp, "independent": independent}[sys.argv[1]](Path(sys.argv[2]))
