"""APD beside what else may take the place of a bank of samples; and whether it finds all modes.

    python -m benchmarks.apd bank [--runs FOLDER] [--seeds 0 1 2]
    python -m benchmarks.apd modes [--runs FOLDER]

`bank` compares at equal bytes, on MNIST and notMNIST, which must be in REVFLIP_DATA. FOLDER has
the runs that `python -m benchmarks.mnist_posterior --write FOLDER` makes: banks of one chain (sgld)
and of four (sgld_chains), and networks with dropout. Writes results/apd.json.

`modes` takes posteriors whose modes are known, and the banks of four chains, each of which is a
mode. Writes results/apd_modes.json and recipes/mnist/apd_modes.png.

One thread; seconds are CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import apd_bank, apd_modes, measure

CONSOLE = Console(width=220)
CHECKPOINT = "version_0/checkpoints/last.ckpt"


def bank(runs: Path, seeds: list[int]) -> None:
    """One table at equal bytes."""
    images = apd_bank.Images.mnist()
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for run in ("sgld", "sgld_chains"):
            path = runs / f"{run}-{seed}" / "version_0" / "posterior"
            checkpoint = runs / f"mc_dropout-{seed}" / CHECKPOINT
            found = apd_bank.compare(path, checkpoint, images, raw=seed == seeds[0], seed=seed)
            for row in found:
                if row["posterior"] == apd_bank.WHITENED:
                    row["accepted"] = apd_bank.acceptance([found[0], row])
                rows.append({"run": run, "seed": seed, **row})
            measure.write("apd", rows, device="cpu")  # what there is, if a later one fails
    CONSOLE.print(apd_bank.table(rows))


def modes(runs: Path, seeds: list[int]) -> None:
    """Posteriors with several modes."""
    rows: list[dict[str, Any]] = []
    points: dict[str, apd_modes.Points] = {}
    for seed in seeds:
        for case in apd_modes.cases(runs, seed):
            found, drawn = apd_modes.compare(case, seed=seed)
            rows += found
            points.setdefault(case.name, drawn)
            CONSOLE.print(apd_modes.table(found))
        measure.write("apd_modes", rows, device="cpu")  # what there is, if a later one fails
    CONSOLE.print(apd_modes.table(rows))
    apd_modes.figure(points).savefig("recipes/mnist/apd_modes.png", dpi=80)


PARTS: dict[str, Callable[[Path, list[int]], None]] = {"bank": bank, "modes": modes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", type=Path, metavar="FOLDER", default=Path("runs/posteriors"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    PARTS[options.part](options.runs, options.seeds)


if __name__ == "__main__":
    main()
