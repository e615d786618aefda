"""The table of versions is of the tests that were run."""

import json
import re
from pathlib import Path

import pytest
from packaging.version import Version

from benchmarks import measure, versions

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_passes(number): pass

def test_fails(): assert False

def test_breaks(missing_fixture): pass

def test_is_skipped(): pytest.skip("no reason")

@pytest.mark.slow
def test_is_not_selected(): assert False
"""


@pytest.fixture
def tests(tmp_path):
    path = tmp_path / "test_outcomes.py"
    path.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n    data\n")
    return str(path)


def test_outcomes_are_counted_and_failures_named(tests, tmp_path):
    found = versions.run_tests([tests], [f"--rootdir={tmp_path}", "-p", "no:cacheprovider"])
    assert {name: found[name] for name in ("passed", "failed", "skipped")} == {
        "passed": 3,
        "failed": 2,
        "skipped": 1,
    }
    names = [name.rpartition("::")[2] for name in found["failures"]]
    assert names == ["test_breaks", "test_fails"]


def test_no_tests_are_no_success(tmp_path):
    with pytest.raises(RuntimeError, match="pytest ended with"):
        versions.run_tests([str(tmp_path / "missing.py")], ["-p", "no:cacheprovider"])


def row(torch, passed):
    return {
        "versions": versions.versions() | {"torch": torch},
        "package": "wheel",
        "passed": passed,
        "failed": 0,
        "skipped": 1,
        "failures": [],
        "environment": {"date": "2026-01-02"},
    }


def test_a_row_replaces_that_of_the_same_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for torch, passed in (("2.13.0+cpu", 5), ("2.6.0+debian", 7), ("2.13.0+cpu", 9)):
        versions.write(row(torch, passed))
    rows = json.loads((tmp_path / "versions.json").read_text())["rows"]
    assert [(each["versions"]["torch"], each["passed"]) for each in rows] == [
        ("2.6.0+debian", 7),
        ("2.13.0+cpu", 9),
    ]
    assert "| 2.6.0+debian |" in versions.markdown().splitlines()[2]
    assert versions.markdown().endswith("| 9 | 0 | 1 | 2026-01-02 |")


def test_every_core_test_is_there():
    root = measure.RESULTS.parents[1]
    assert [path for path in versions.CORE if not (root / path).exists()] == []


def test_no_environment_failed_without_a_reason():
    rows = json.loads((measure.RESULTS / "versions.json").read_text())["rows"]
    assert rows
    assert all(not each["failures"] or each["note"] in versions.markdown() for each in rows)


def test_the_lowest_versions_that_are_allowed_were_run():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    dependencies = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    floors = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', dependencies)
    assert len(floors) > 5
    rows = json.loads((measure.RESULTS / "versions.json").read_text())["rows"]
    for name, floor in floors:
        lowest, wanted = min(Version(each["versions"][name]) for each in rows), Version(floor)
        assert lowest.release[: len(wanted.release)] == wanted.release, name
