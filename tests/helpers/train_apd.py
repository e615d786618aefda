"""An APDModule in two processes: `python -m tests.helpers.train_apd DIR`."""

import sys
from pathlib import Path

import torch

from lightning_revflip.posterior import SampleBank
from tests.helpers.distilled import codes_of, small_apd
from tests.helpers.models import quiet_trainer


def main(folder: Path) -> None:
    """Write the state and the metrics of this process after a few steps."""
    codec, data = codes_of(SampleBank(folder / "bank"), batch_size=80)
    module = small_apd(codec)
    trainer = quiet_trainer(folder, strategy="ddp", devices=2)
    trainer.fit(module, data)
    found = {"state": module.state_dict(), "metrics": dict(trainer.callback_metrics)}
    torch.save(found, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
