"""SGLD: steps per second, collecting samples, prediction.

    python -m benchmarks.sgld [steps collection prediction] [--quick]

One thread, network 784-100-10, batches of 100. posteriors and torch-uncertainty are measured beside
where they are installed. Each part writes results/sgld_PART.json; `benchmarks.sgld_crash` kills
writers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console

from benchmarks import measure, sgld_prediction, sgld_steps

CONSOLE = Console()


def steps(quick: bool) -> None:
    """Steps per second."""
    rows = sgld_steps.measure_steps(2.0 if quick else 60.0)
    CONSOLE.print(sgld_steps.table(rows, first="optimizer", ratio="of_sgd", time="median"))
    if not quick:
        CONSOLE.print(f"written to {measure.write('sgld_steps', rows)}")


def collection(quick: bool) -> None:
    """What collecting samples adds."""
    rows = sgld_steps.measure_collection(2.0 if quick else 60.0)
    CONSOLE.print(sgld_steps.table(rows, first="collector", ratio="of_steps", time="mean"))
    if not quick:
        CONSOLE.print(f"written to {measure.write('sgld_collection', rows)}")


def prediction(quick: bool) -> None:
    """Predictions of 100 samples."""
    rows = sgld_prediction.measure_prediction(2.0 if quick else 40.0)
    CONSOLE.print(sgld_prediction.table(rows))
    if not quick:
        CONSOLE.print(f"written to {measure.write('sgld_prediction', rows)}")


PARTS: dict[str, Callable[[bool], None]] = {
    "steps": steps,
    "collection": collection,
    "prediction": prediction,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--quick", action="store_true", help="a glance, no results file")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        PARTS[part](options.quick)


if __name__ == "__main__":
    main()
