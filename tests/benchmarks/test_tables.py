"""The page of benchmarks shows every result, by tables and figures made of it."""

import re
from pathlib import Path

import pytest

from benchmarks import figures, measure, tables

RESULTS = sorted(path.stem for path in measure.RESULTS.glob("*.json"))
ELSEWHERE = {"compatibility", "versions"}  # shown on pages of their own


def test_every_results_file_is_shown_on_the_page_of_benchmarks():
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = {name for name in re.findall(r'"(\w+)"', page) if name in RESULTS}
    assert shown == set(RESULTS) - ELSEWHERE
    assert shown <= set(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_has_a_sentence_and_its_machine_and_command(name):
    sentence, table, source = tables.show(name).strip().split("\n\n")
    environment = tables.read(name)["environment"]
    assert sentence.endswith(".")
    assert len({line.count("|") for line in table.splitlines()}) == 1
    for key in ("device", "torch", "python", "date", "command"):
        assert environment[key] in source


def test_figures_of_a_table_are_those_of_the_results():
    rows = tables.read("language_model")["rows"]
    lines = tables.show("language_model").split("\n\n")[1].splitlines()[2:]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        model, peak = (line.split("|")[column].strip() for column in (2, 6))
        assert model == row["model"]
        assert peak == f"{row['peak_bytes'] / 1e6:,.1f}"


def test_empty_columns_are_left_out():
    made = tables.markdown.table(["a", "b", "c"], [["x", "", 1], ["y", "", 2]])
    assert made == "| a | c |\n| --- | --: |\n| x | 1 |\n| y | 2 |"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_takes_the_colour_of_the_text_and_says_what_it_shows(name):
    shown = figures.show(name)
    assert shown.startswith('<figure class="plot"><svg role="img" aria-label="')
    assert "currentcolor" in shown
    assert "#000000" not in shown
    assert "fill: #ffffff" not in shown
    assert "<g id=" not in shown
    assert "\n" not in shown  # a blank line would end the HTML in Markdown


def test_a_figure_is_the_same_in_each_build():
    assert figures.show("sgld_steps") == figures.show("sgld_steps")


def test_the_figure_of_the_readme_has_a_line_for_each_model_and_length():
    peaks, times = figures.memory().axes
    rows = {(row["model"], row["steps"]): row for row in tables.read("language_model")["rows"]}
    for axes in (peaks, times):
        assert len(axes.lines) == 3
    for line, model in zip(
        peaks.lines, ("nn.LSTM", "nn.LSTM, checkpointed", "RevLSTM, chunk 4"), strict=True
    ):
        measured = [rows[model, steps]["peak_bytes"] / 1e6 for steps in (70, 500, 2000)]
        assert line.get_ydata().tolist() == measured
