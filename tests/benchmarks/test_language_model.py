"""The benchmark of language models, on a model that takes no time."""

import json
import shutil

import pytest
import torch
from matplotlib.image import imread

from benchmarks import language_model, measure

SMALL = ["--vocab=50", "--hidden=8", "--batch=3", "--device=cpu", "--seconds=0", "--rounds=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run over two lengths left its files."""
    folder = tmp_path_factory.mktemp("benchmarks")
    call(folder, "--steps", "6", "12", "--chunks", "2", "4/1/20")
    return folder


@pytest.fixture
def rows(folder):
    return json.loads((folder / "language_model.json").read_text())["rows"]


def call(folder, *argv):
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "RESULTS", folder)
        language_model.main([*SMALL, f"--figures={folder}", *argv])
    torch.set_num_threads(threads)


def test_every_model_has_a_row_for_every_length(rows):
    kinds = {"GRU": [], "LSTM": []}
    for row in rows:
        kinds[row["cell"]].append((row["steps"], row["model"].replace(row["cell"], "")))
    names = ["nn.", "nn., checkpointed", "Rev, chunk 2", "Rev, chunk 4/1/20"]
    expected = [(steps, name) for steps in (6, 12) for name in names]
    expected.insert(4, (6, "Rev, chunk 2, equal size"))
    assert kinds["GRU"] == kinds["LSTM"] == expected


def test_ratios_are_to_the_ordinary_models_of_the_same_length(rows):
    by_name = {(row["steps"], row["model"]): row for row in rows}
    for row in rows:
        for suffix, name in (("", "nn.LSTM"), ("_same_cell", f"nn.{row['cell']}")):
            base = by_name[row["steps"], name]
            expected = row["seconds"]["median"] / base["seconds"]["median"]
            assert row[f"time_ratio{suffix}"] == pytest.approx(expected)
            expected = base["peak_bytes"] / row["peak_bytes"]
            assert row[f"peak_ratio{suffix}"] == pytest.approx(expected)


def test_the_peak_holds_what_must_be_alive_at_once(rows):
    for row in rows:
        if row["model"] in ("nn.GRU", "nn.LSTM"):
            logits = 4 * row["steps"] * row["batch"] * row["vocab"]
            assert row["peak_bytes"] > 2 * logits
        assert row["gradient_bytes"] == 4 * row["parameters"]


def test_stored_bits_are_recorded_beside_the_information(rows):
    reversible = [row for row in rows if row["model"].startswith("Rev")]
    for row in reversible:
        assert row["stored_bits"] >= row["information_bits"] > 0
        units = row["steps"] * row["batch"] * row["hidden_size"] * (1 + (row["cell"] == "LSTM"))
        assert row["bits_per_unit_step"] == pytest.approx(row["stored_bits"] / units)
    assert [row["chunk_steps"] for row in reversible[:2]] == [2, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", {"chunk_steps": None, "segment_steps": None}),
        ("4", {"chunk_steps": 4, "segment_steps": None}),
        ("10/5 segments", {"chunk_steps": 10, "read_out_steps": 5, "segment_steps": "auto"}),
        (
            "4/2/9",
            {"chunk_steps": 4, "read_out_steps": 2, "vocab_chunk": 9, "segment_steps": None},
        ),
    ],
)
def test_settings_are_read_from_the_command_line(text, expected):
    assert language_model.settings(text) == expected


def test_checkpointing_changes_neither_loss_nor_gradients():
    tokens = torch.randint(50, (11, 3))
    plain = language_model.Ordinary("LSTM", 50, 8)
    again = language_model.Ordinary("LSTM", 50, 8, checkpointed=True)
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        model(tokens[:-1], tokens[1:]).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(again.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_models_of_equal_size_differ_by_less_than_two_percent(kind):
    hidden = language_model.equal_hidden(kind, 10_000, 650)
    with torch.device("meta"):
        ordinary = language_model.parameters(language_model.Ordinary(kind, 10_000, 650))
        reversible = language_model.parameters(language_model.Reversible(kind, 10_000, hidden))
    assert reversible == pytest.approx(ordinary, rel=0.02)


def test_the_figure_can_be_drawn_again_from_the_results(folder, tmp_path):
    shutil.copy(folder / "language_model.json", tmp_path)
    call(tmp_path, "--plot")
    assert (imread(tmp_path / "language_model.png") == imread(folder / "language_model.png")).all()


def test_the_figure_shows_the_models_measured_at_every_length(rows):
    missing = "RevLSTM, chunk 4/1/20"
    shown = [row for row in rows if (row["steps"], row["model"]) != (12, missing)]
    memories, times = language_model.draw(shown).axes
    names = [line.get_label() for line in memories.lines]
    assert names == [row["model"] for row in shown if row["steps"] == 12]
    for name, peak, time in zip(names, memories.lines, times.lines, strict=True):
        mine = [row for row in rows if row["model"] == name]
        assert peak.get_xdata().tolist() == time.get_xdata().tolist() == [6, 12]
        assert peak.get_ydata().tolist() == [row["peak_bytes"] / 1e6 for row in mine]
        seconds = [row["seconds"]["median"] / row["steps"] / row["batch"] for row in mine]
        assert time.get_ydata().tolist() == pytest.approx([1e6 * s for s in seconds])


def test_models_that_ran_out_of_memory_are_shown_as_such(rows):
    for row in rows:
        if row["model"] == "nn.LSTM":
            row["seconds"] = None
            del row["peak_bytes"], row["time_ratio"], row["peak_ratio"]
    assert list(language_model.table(rows).columns[3].cells).count("out of memory") == 2
    names = [line.get_label() for line in language_model.draw(rows).axes[0].lines]
    assert "nn.LSTM" not in names
    assert "nn.GRU" in names


def test_segments_are_compared_on_long_sequences(tmp_path):
    call(tmp_path, "--long", "--steps", "400", "--chunks", "9", "9 segments")
    rows = json.loads((tmp_path / "long_sequence.json").read_text())["rows"]
    kept = {row["model"]: row.get("stored_bits") for row in rows}
    assert list(kept)[:2] == ["nn.LSTM", "nn.LSTM, checkpointed"]
    assert kept["RevLSTM, chunk 9 segments"] < kept["RevLSTM, chunk 9"]
