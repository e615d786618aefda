"""SGLD: steps per second, collecting samples, prediction.

    python -m benchmarks.sgld [steps collection prediction] [--quick]

One thread, network 784-100-10, batches of 100. posteriors and torch-uncertainty are measured beside
where they are installed. Each part writes results/sgld_PART.json; `benchmarks.sgld_crash` kills
writers.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import measure, sgld_prediction, sgld_steps
from benchmarks.measure import Part


def steps(quick: bool) -> Part:
    """Steps per second."""
    rows = sgld_steps.measure_steps(2.0 if quick else 60.0)
    return Part(rows, sgld_steps.table(rows, first="optimizer", ratio="of_sgd", time="median"))


def collection(quick: bool) -> Part:
    """What collecting samples adds."""
    rows = sgld_steps.measure_collection(2.0 if quick else 60.0)
    return Part(rows, sgld_steps.table(rows, first="collector", ratio="of_steps", time="mean"))


def prediction(quick: bool) -> Part:
    """Predictions of 100 samples."""
    rows = sgld_prediction.measure_prediction(2.0 if quick else 40.0)
    return Part(rows, sgld_prediction.table(rows))


PARTS: dict[str, Callable[[bool], Part]] = {
    "steps": steps,
    "collection": collection,
    "prediction": prediction,
}


def main() -> None:
    measure.run_parts("sgld", PARTS, __doc__)


if __name__ == "__main__":
    main()
