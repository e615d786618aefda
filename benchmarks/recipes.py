"""What recipes reach that no other benchmark runs: classifiers of digits, a pole that is balanced.

    python -m benchmarks.recipes [--runs mlp mlp,flipout_bayes ...] [--seeds 0 1 2]

Runs `revflip fit` and `revflip test` with the configurations as they are and collects what they
log. Writes results/recipes.json; runs of MNIST need it in REVFLIP_DATA.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure

RUNS = {
    "cartpole": "es_cartpole",
    "mlp,flipout_bayes,small": "mnist",
    "mlp,es,small": "mnist",
    "mlp": "mnist",
    "mlp,flipout_bayes": "mnist",
    "mlp,es": "mnist",
}


def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and test as a user would, with one thread.

    Returns:
        The figures of the test, and the seconds that training took.
    """
    recipe = RUNS[name]
    configs = Path("recipes") / recipe / "configs"
    parts = ["base", *name.split(",")] if recipe == "mnist" else ["base"]
    command = [f"--config={configs / part}.yaml" for part in (*parts, "csv")]
    command += [f"--trainer.logger.init_args.save_dir={folder}", f"--seed_everything={seed}"]
    command += ["--trainer.logger.init_args.name=run", "--trainer.accelerator=cpu"]
    if recipe == "es_cartpole":
        command += [f"--model.seed={seed}"]
    elif "small" not in parts:
        command += ["--data.source=mnist"]
    begin = time.perf_counter()
    _revflip("fit", *command)
    seconds = time.perf_counter() - begin
    fitted, tested = folder / "run" / "version_0", folder / "run" / "version_1"
    _revflip("test", *command, f"--ckpt_path={fitted / 'checkpoints' / 'last.ckpt'}")
    figures = _last_values(tested / "metrics.csv", "test/")
    generations = _last_values(fitted / "metrics.csv", "step")
    return {
        "run": name,
        "recipe": recipe,
        "seed": seed,
        "steps": int(generations["step"]) + 1,
        "seconds": round(seconds, 1),
        **{key.removeprefix("test/"): value for key, value in figures.items()},
    }


def _revflip(*command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "lightning_revflip.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _last_values(path: Path, prefix: str) -> dict[str, float]:
    """What a run logged last under names that begin so."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {
        key: float(value)
        for row in rows
        for key, value in row.items()
        if key.startswith(prefix) and value
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """A row a run."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = Table(*columns)
    for row in rows:
        values = (row.get(key, "") for key in columns)
        shown.add_row(*(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    for name in options.runs:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run(name, seed, Path(folder)))
            path = measure.write("recipes", rows)  # after each run: all of them take half an hour
    Console(width=160).print(table(rows))
    print(path)


if __name__ == "__main__":
    main()
