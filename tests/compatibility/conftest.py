"""Writes how the cells came out, if REVFLIP_MATRIX=1: `benchmarks/results/compatibility.json`."""

import json
import os
from importlib import metadata

import pytest

from benchmarks.measure import RESULTS, environment
from tests.helpers.compatibility_cells import matrix, row

_passed: dict[str, bool] = {}
"""By cell."""


@pytest.fixture(autouse=True)
def name_the_cell(request, record_property):
    """Tells the report of a test which cell it is of; reports also come from other processes."""
    if "cell" in request.fixturenames:
        cell = request.getfixturevalue("cell")
        record_property("cell", f"{cell.axis}: {cell}")


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name == "cell":
            _passed[value] = _passed.get(value, True) and report.passed


def pytest_sessionfinish(session):
    if os.environ.get("REVFLIP_MATRIX") != "1" or hasattr(session.config, "workerinput"):
        return
    head = environment("cpu") | {
        "lightning": metadata.version("lightning"),
        "command": "make matrix",
    }
    rows = []
    for cell in matrix():
        passed = _passed.get(f"{cell.axis}: {cell}")
        if passed is not None or cell.inapplicable:
            rows.append(row(cell) if passed or cell.inapplicable else row(cell, "failed"))
    path = RESULTS / "compatibility.json"
    path.write_text(json.dumps({"environment": head, "rows": rows}, indent=1) + "\n")
