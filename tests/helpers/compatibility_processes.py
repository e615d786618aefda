"""All cells with two processes, in one pair of them: `... compatibility_processes DIR`.

Each process writes what it found, by cell; the tests compare.
"""

import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_revflip.strategies import IndependentChainsStrategy
from tests.helpers.compatibility import EPOCHS, SEED, Run, evaluate, results, saved, weights
from tests.helpers.compatibility_cells import CHAINS, DDP, Cell, cells
from tests.helpers.compatibility_models import Data, Late, Sequences

PROCESSES = 2
CLIP = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulate and clip": CLIP,
}


class Seed(Callback):
    """Lets new layers have the same weights, whatever was drawn before."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(torch.initial_seed())


def make(cell: Cell, folder: Path, processes: int, **settings: Any) -> Run:
    """A run of a cell; with one process, the run that it is compared with."""
    subject = cell.subject
    alone = processes == 1
    if cell.axis == CHAINS:
        # Weights that are drawn in the processes differ between chains.
        ordinary = type(subject.model(folder)) is Sequences
        settings["model"] = Late() if ordinary else None
        strategy = "auto" if alone else IndependentChainsStrategy()
    else:
        strategy = "auto" if alone else "ddp"
        data = subject.data(folder)
        if isinstance(data, Data):
            seed = SEED if alone else None
            settings["data"] = Data(data.batch_size // processes, data.shuffle, seed)
        settings["before"] = [Seed()]
    return subject.run(
        folder, strategy=strategy, devices=processes, **SETTINGS.get(cell.value, {}), **settings
    )


def found_by(cell: Cell, folder: Path) -> dict[str, Any]:
    """What a process found; what must hold in each by itself is checked here."""
    run = make(cell, folder, PROCESSES, max_epochs=2 * EPOCHS if cell.value == "resume" else EPOCHS)
    try:
        run.fit()
    except Exception as error:
        return {"error": str(error), "batches": run.watch.batches}
    found: dict[str, Any] = {"weights": weights(run.model), "gradients": run.watch.gradients}
    if cell.axis == DDP:
        cell.subject.promise(run)
    if cell.value == "evaluate":
        found["checkpoint"] = saved(run)
        fresh = make(cell, folder, PROCESSES, seed=99)
        found["metrics"] = evaluate(fresh, "validate", found["checkpoint"])
    if cell.value == "resume":
        half = folder / "half"
        checkpoint = saved(make(cell, half, PROCESSES).fit())
        resumed = make(cell, half, PROCESSES, max_epochs=2 * EPOCHS)
        torch.rand(3)  # the order of the data follows from the seed, all else from the checkpoint
        resumed.fit(ckpt_path=checkpoint)
        found["whole"], found["resumed"] = results(run), results(resumed)
    return found


def main(folder: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found, rank = {}, 0
    for parameters in cells(DDP) + cells(CHAINS):
        (cell,) = parameters.values
        try:
            found[cell] = found_by(cell, folder / cell.axis.replace(" ", "-") / str(cell))
        except Exception:
            found[cell] = {"failed": traceback.format_exc()}
        rank = torch.distributed.get_rank()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
