"""The figures of README files are those of benchmarks/results."""

import re

import pytest

from benchmarks.readme import ROOT, TABLES, filled

MADE = [(file, make) for file, tables in TABLES.items() for make in tables]
NAMES = [f"{file}-{make.__name__}" for file, make in MADE]


def written(file):
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", TABLES)
def test_tables_and_figures_are_made_of_the_results(file):
    assert filled(written(file), TABLES[file]) == written(file), "run `python -m benchmarks.readme`"


@pytest.mark.parametrize("file", TABLES)
def test_every_place_is_filled_once(file):
    places = re.findall(r"<!-- (?:table|figures): (\w+) -->", written(file))
    assert sorted(places) == sorted(make.__name__ for make in TABLES[file])


@pytest.mark.parametrize(("file", "make"), MADE, ids=NAMES)
def test_a_figure_that_was_typed_in_does_not_stay(file, make):
    changed = written(file).replace(make(), "1.23")
    assert changed != written(file)
    assert filled(changed, [make]) == written(file)


@pytest.mark.parametrize("file", TABLES)
def test_only_tables_have_comments_at_the_beginning_of_a_line(file):
    """There Markdown ends the paragraph."""
    names = re.findall(r"^ *<!-- (?:figures|end): (\w+) -->", written(file), re.MULTILINE)
    assert names == re.findall(r"^<!-- table: (\w+) -->$", written(file), re.MULTILINE)


def test_a_lost_place_of_a_table_is_named():
    with pytest.raises(ValueError, match="no place for memory: .*<!-- table: memory -->"):
        filled("nothing here", TABLES["README.md"])
