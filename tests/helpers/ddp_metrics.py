"""Metrics in two processes that each see half of the data: `python -m ... DIR RANK`."""

import sys
from pathlib import Path

import torch
from torch import distributed

from lightning_revflip.metrics import (
    EnsembleCalibrationError,
    MutualInformation,
    OutOfDistributionDetection,
    PredictiveEntropy,
    VariationRatio,
)

PROCESSES = 2


def compute(part: slice) -> dict[str, torch.Tensor]:
    """All metrics of a part of the examples, in two updates of different sizes."""
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(5, 61, 4, generator=generator)).softmax(-1)[:, part]
    target = torch.randint(4, (61,), generator=generator)[part]
    scores = torch.randn(61, generator=generator).round(decimals=1)[part]
    is_out = torch.rand(61, generator=generator)[part] > 0.6
    values = {}
    for metric in (PredictiveEntropy(), MutualInformation(), VariationRatio()):
        metric.update(probs[:, :7])
        metric.update(probs[:, 7:])
        values[type(metric).__name__] = metric.compute()
    calibration, detection = EnsembleCalibrationError(num_classes=4), OutOfDistributionDetection()
    for rows in (slice(None, 7), slice(7, None)):
        calibration.update(probs[:, rows], target[rows])
        detection.update(scores[rows], is_out[rows])
    return {**values, "calibration": calibration.compute(), **detection.compute()}


def compute_alone(rank: int) -> dict[str, torch.Tensor]:
    """Detection where only the first process has seen examples."""
    metric = OutOfDistributionDetection()
    if rank == 0:
        metric.update(torch.tensor([1.0, 3, 2]), torch.tensor([False, True, True]))
    return metric.compute()


def main(folder: Path, rank: int) -> None:
    """Write what this process computes; the halves have different sizes."""
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    torch.save(compute(slice(rank, None, PROCESSES)), folder / f"{rank}.pt")
    torch.save(compute_alone(rank), folder / f"alone{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
