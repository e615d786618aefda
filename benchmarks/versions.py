"""The core tests with other versions of Python, torch, Lightning and the rest.

Run it in each environment: it adds a row to `results/versions.json`, or replaces that of the same
versions. Options that it does not know, such as `-n 2`, go to pytest.

    python -m benchmarks.versions -n 2
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import lightning_revflip
from benchmarks import measure

CORE = [
    "tests/test_convert.py",
    "tests/test_convert_upgrade.py",
    "tests/test_reversible_flipout.py",
    "tests/test_native.py",
    "tests/callbacks",
    "tests/modules",
    "tests/metrics",
    "tests/reversible/test_rnn.py",
    "tests/reversible/test_reversal.py",
    "tests/reversible/test_kernels.py",
    "tests/reversible/test_sequence_use.py",
    "tests/flipout/test_conversion.py",
    "tests/flipout/test_evolution_processes.py",
    "tests/flipout/test_recurrent_use.py",
    "tests/flipout/test_sampling.py",
    "tests/flipout/test_transforms.py",
    "tests/sgld/test_native.py",
    "tests/sgld/test_optimizer_contract.py",
    "tests/sgld/test_optimizer_steps.py",
    "tests/posterior/test_bank.py",
    "tests/posterior/test_gaussian.py",
    "tests/posterior/test_predict.py",
    "tests/apd/test_distilled.py",
    "tests/apd/test_train.py",
]
"""Where torch and Lightning are called in many ways; tests of numerics alone are left out."""

SELECTED = "not slow and not gpu and not data"
PACKAGES = [
    "torch",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "rich",
    "safetensors",
    "wandb",
    "numpy",
]


def versions() -> dict[str, str]:
    """Of Python and the packages that decide whether the core tests pass."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def outcomes(report: Path) -> dict[str, Any]:
    """What pytest's report in JUnit's format says: counts, and the names of tests that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in bad),
    }


def run_tests(tests: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Run tests in a process of their own.

    Raises:
        RuntimeError: if pytest runs none, or cannot collect them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *tests, "-m", SELECTED, "-q", *options]
        code = subprocess.run([*command, f"--junitxml={report}"], check=False).returncode
        if code not in (0, 1):  # 1: some tests failed
            raise RuntimeError(f"pytest ended with {code}. Its output says why.")
        return outcomes(report)


def row(tests: Sequence[str] = CORE, options: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, machine, and how the tests came out."""
    checkout = Path(__file__).parents[1] / "lightning_revflip"
    imported = Path(lightning_revflip.__file__).parent
    return {
        "versions": versions(),
        "package": "checkout" if imported == checkout else "wheel",
        **run_tests(tests, options),
        "environment": measure.environment("cpu"),
    }


def write(new: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a row into the file, in the place of that of the same versions if there is one.

    Returns:
        All rows, oldest Python and torch first.
    """
    path = measure.RESULTS / "versions.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [each for each in rows if each["versions"] != new["versions"]]
    rows = sorted([*rows, new], key=_age)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows, as they are shown in a terminal."""
    found = Table("python", *PACKAGES, "package", "passed", "failed", "skipped")
    for each in rows:
        counts = (str(each[name]) for name in ("passed", "failed", "skipped"))
        found.add_row(*each["versions"].values(), each["package"], *counts)
    return found


def markdown() -> str:
    """The rows of the file and their notes, as they are shown in the documentation."""
    rows = json.loads((measure.RESULTS / "versions.json").read_text())["rows"]
    columns = ["python", *PACKAGES]
    lines = [[*columns, "passed", "failed", "skipped", "run on"], ["---"] * (len(columns) + 4)]
    for each in rows:
        counts = [str(each[name]) for name in ("passed", "failed", "skipped")]
        shown = [each["versions"][name] for name in columns]
        lines.append([*shown, *counts, each["environment"]["date"]])
    notes = [
        f"\nPython {each['versions']['python']}: {each['note']}" for each in rows if "note" in each
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes])


def _age(each: dict[str, Any]) -> list[tuple[int, ...]]:
    ordered = (each["versions"][name] for name in ("python", "torch", "lightning"))
    return [tuple(map(int, version.split("+")[0].split(".")[:3])) for version in ordered]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tests and note how they came out; fails if one of them did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tests", nargs="+", default=CORE, help="other tests than the core's")
    args, options = parser.parse_known_args(argv)
    new = row(args.tests, options)
    Console().print(table(write(new)))
    sys.exit(1 if new["failed"] else 0)


if __name__ == "__main__":
    main()
