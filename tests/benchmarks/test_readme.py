"""The figures of README files are those of benchmarks/results."""

import pytest

from benchmarks.readme import ROOT, TABLES, filled


@pytest.mark.parametrize("file", TABLES)
def test_the_tables_are_made_of_the_results(file):
    written = (ROOT / file).read_text(encoding="utf-8")
    assert filled(written, TABLES[file]) == written, "run `python -m benchmarks.readme`"


@pytest.mark.parametrize("file", TABLES)
def test_a_figure_that_was_typed_in_does_not_stay(file):
    written = (ROOT / file).read_text(encoding="utf-8")
    make = next(iter(TABLES[file].values()))
    figure = make().rsplit("|", 2)[1].strip()
    assert filled(written.replace(figure, "1.23"), TABLES[file]) == written


def test_a_lost_place_of_a_table_is_named():
    with pytest.raises(ValueError, match="no place for a table: .*<!-- table: memory -->"):
        filled("nothing here", TABLES["README.md"])
