"""The table of the documentation is that of the tests."""

import json

import pytest

from benchmarks.measure import RESULTS
from benchmarks.tables.compatibility import show
from tests.helpers.compatibility_cells import AXES, EXCEPTIONS, SUBJECTS, matrix, row


def test_the_results_are_those_of_all_cells():
    rows = json.loads((RESULTS / "compatibility.json").read_text())["rows"]
    assert rows == [row(cell) for cell in matrix()], "run `make matrix`"


def test_every_exception_is_one_of_a_cell():
    for axis, names, values, _ in EXCEPTIONS:
        assert set(names) <= set(SUBJECTS)
        assert set(values) <= set(AXES[axis])


@pytest.mark.parametrize("axis", AXES)
def test_a_table_has_a_row_for_each_callback_and_says_why_something_is_refused(axis):
    table, _, notes = show(axis).partition("\n\n")
    lines = table.splitlines()[2:]
    assert [line.split("|")[1].strip(" `") for line in lines] == list(SUBJECTS)
    for cell in matrix(axis):
        assert cell.exception is None or cell.exception.reason.lower() in notes.lower()
