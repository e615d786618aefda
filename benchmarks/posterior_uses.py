"""What posteriors of MNIST networks are good for: anomalies and attacks.

    python -m benchmarks.posterior_uses [--runs FOLDER] [--seeds 0]

FOLDER has the runs that `python -m benchmarks.mnist_posterior --write FOLDER` makes. Of these the
single network (sgd), the one with dropout (mc_dropout) and the bank (sgld) are compared, and what
is distilled of the bank. Needs MNIST, notMNIST and Omniglot in REVFLIP_DATA; writes
results/posterior_uses.json.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import measure
from lightning_revflip.apd import distil
from lightning_revflip.applications import (
    DropoutPredictor,
    NetworkPredictor,
    PosteriorPredictor,
    Predictor,
    detect_anomalies,
    fgsm,
    pgd,
    under_attack,
)
from lightning_revflip.applications.attacks import Attack
from lightning_revflip.posterior import SampleBank
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.outliers import available_kinds, find_outliers

NETWORKS = 40
"""Of a posterior, and passes of dropout."""
OUTLIERS = 2000
ATTACKED = 500
EPSILONS = (0.0, 0.05, 0.1, 0.15, 0.3)
ATTACKS: dict[str, Attack] = {
    "FGSM": fgsm,
    "PGD": partial(pgd, steps=40, generator=torch.Generator().manual_seed(0)),
}


def predictors(runs: Path, seed: int) -> dict[str, Predictor]:
    """What is compared, by name."""
    last = "version_0/checkpoints/last.ckpt"

    def trained(run: str) -> Classifier:
        return Classifier.load_from_checkpoint(runs / f"{run}-{seed}" / last, map_location="cpu")

    bank = SampleBank(runs / f"sgld-{seed}" / "version_0" / "posterior")
    random = torch.Generator().manual_seed(seed)
    plain = Classifier((1, 28, 28), 10, network="mlp", hidden=[100])
    return {
        "sgd": NetworkPredictor(trained("sgd")),
        "mc_dropout": DropoutPredictor(trained("mc_dropout"), NETWORKS),
        "sgld": PosteriorPredictor(bank, plain, NETWORKS),
        "apd": PosteriorPredictor(distil(bank, seed=seed), plain, NETWORKS, generator=random),
    }


def measure_uses(runs: Path, seed: int) -> list[dict[str, Any]]:
    """All figures of a seed: `anomalies` by data set and score, `attacks` by kind and epsilon."""
    test = HandwrittenDigits(source="mnist").test_set()
    outliers: dict[str, Tensor] = {
        kind: find_outliers(kind, test.images, 1.0, OUTLIERS, seed).images
        for kind in available_kinds(test.images.shape[1:])
    }
    rows = []
    for name, predictor in predictors(runs, seed).items():
        found = detect_anomalies(predictor, test.images, outliers, size=OUTLIERS, seed=seed)
        row: dict[str, Any] = {"posterior": name, "seed": seed, "anomalies": found.metrics()}
        for attack, make in ATTACKS.items():
            images, labels = test.images[:ATTACKED], test.labels[:ATTACKED]
            row[attack] = under_attack(predictor, images, labels, EPSILONS, make).metrics()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, metavar="FOLDER", default=Path("runs/posteriors"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in options.seeds for row in measure_uses(options.runs, seed)]
    Console().print(rows)
    print(measure.write("posterior_uses", rows, device="cpu"))


if __name__ == "__main__":
    main()
