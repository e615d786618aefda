"""Posteriors of a network on MNIST: accuracy, calibration, and telling outliers from digits.

    python -m benchmarks.mnist_posterior [--runs sgd mc_dropout sgld ...] [--seeds 0 1 2]

Runs `revflip fit` and `revflip test` with the recipe's configurations, each as it is, and collects
what they log. Needs MNIST and notMNIST in REVFLIP_DATA; writes results/mnist_posterior.json.
`--read FOLDER` reads runs that were made before, FOLDER/RUN-SEED; `--write FOLDER` keeps them.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure

CONFIGS = Path("recipes/mnist/configs")
RUNS = {
    "sgd": ["sgd", "report"],
    "mc_dropout": ["mc_dropout"],
    "deep_ensemble": ["deep_ensemble"],
    "sgld": ["sgld"],
    "sgld_chains": ["sgld_chains"],
    "psgld": ["psgld"],
    "sghmc": ["sghmc"],
    "csgld": ["csgld"],
}
FIGURES = {
    "accuracy": "posterior/accuracy",
    "nll": "posterior/nll",
    "ece": "posterior/ece",
    "networks": "posterior/samples",
    "auroc_entropy": "posterior/auroc/predictive_entropy",
    "auroc_mutual_information": "posterior/auroc/mutual_information",
    "ess_function": "sgld/ess_function",
    "rhat_function": "sgld/rhat_function",
    "ess_weights": "sgld/ess_weights",
    "rhat_weights": "sgld/rhat_weights",
}


def run(name: str, seed: int, folder: Path) -> None:
    """Train and test as a user would, with one thread."""
    configs = [f"--config={CONFIGS / each}.yaml" for each in ("base", "mlp", *RUNS[name], "csv")]
    place = [
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--trainer.logger.init_args.name={name}-{seed}",
        "--data.source=mnist",
        "--data.outliers=notmnist",
        "--trainer.accelerator=cpu",
        f"--seed_everything={seed}",
    ]
    revflip = [sys.executable, "-m", "lightning_revflip.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    _call([*revflip, "fit", *configs, *place], environment)
    (folder / f"{name}-{seed}" / "seconds").write_text(f"{time.perf_counter() - begin:.1f}")
    trained = folder / f"{name}-{seed}" / "version_0"
    checkpoint = f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    _call([*revflip, "test", *configs, *place, checkpoint], environment)


def _call(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def read(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one run."""
    place = folder / f"{name}-{seed}"
    with (place / "version_1" / "metrics.csv").open() as file:
        logged: dict[str, str] = {}
        for row in csv.DictReader(file):
            logged |= {key: value for key, value in row.items() if value}
    found: dict[str, Any] = {"run": name, "seed": seed}
    found["seconds"] = float((place / "seconds").read_text())
    return found | {key: float(logged[of]) for key, of in FIGURES.items() if of in logged}


def table(rows: list[dict[str, Any]]) -> Table:
    """Means and standard deviations over the seeds."""
    shown = Table("run", *FIGURES, "seconds")
    for name in dict.fromkeys(row["run"] for row in rows):
        cells = []
        for key in (*FIGURES, "seconds"):
            values = [row[key] for row in rows if row["run"] == name and key in row]
            spread = f" ± {statistics.stdev(values):.4g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep the runs there")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="of runs made before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.read or options.write or Path(scratch)
        asked = [(name, seed) for name in options.runs for seed in options.seeds]
        if options.read:  # there may be fewer
            asked = [(name, seed) for name, seed in asked if (folder / f"{name}-{seed}").exists()]
        else:
            for name, seed in asked:
                run(name, seed, folder)
        rows = [read(name, seed, folder) for name, seed in asked]
    Console(width=240).print(table(rows))
    print(measure.write("mnist_posterior", rows))


if __name__ == "__main__":
    main()
