"""Benchmarks are listed, and those in parts measure the parts that are named."""

import json
import re

import pytest
import torch
from rich.table import Table

from benchmarks import measure
from benchmarks.measure import Part

FOLDER = measure.RESULTS.parent


def test_every_command_and_every_result_is_listed():
    listed = (FOLDER / "README.md").read_text()
    scripts = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    commands = set(re.findall(r"python -m benchmarks\.(\w+)", listed))
    assert scripts - {"measure"} == commands
    for path in measure.RESULTS.glob("*.json"):
        assert f"`{path.name}`" in listed


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a benchmark of two parts; returns what it wrote, and whether the parts were quick."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    calls = {}

    def part(name):
        def measured(quick):
            calls[name] = quick
            return Part([{"seconds": 1}], Table(f"table of {name}"), {"of": name})

        return measured

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["things", *arguments])
        threads = torch.get_num_threads()
        measure.run_parts("things", {name: part(name) for name in ("one", "two")}, None)
        torch.set_num_threads(threads)
        files = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
        return calls, files

    return run


def test_all_parts_are_measured_shown_and_written(run, capsys):
    calls, files = run()
    assert calls == {"one": False, "two": False}
    assert set(files) == {"things_one.json", "things_two.json"}
    assert files["things_two.json"]["rows"] == [{"seconds": 1}]
    assert files["things_two.json"]["of"] == "two"
    assert "table of one" in capsys.readouterr().out


def test_a_glance_at_a_part_writes_no_results(run, capsys):
    assert run("--quick", "two") == ({"two": True}, {})
    assert "table of two" in capsys.readouterr().out


def test_an_unknown_part_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("three")
    assert "there is no part three; choose from one, two" in capsys.readouterr().err
