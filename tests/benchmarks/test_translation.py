"""The benchmarks of translation models, on models that take no time."""

import argparse
import csv
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import measure, nmt_quality, translation
from lightning_revflip.convert import convert
from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report
from recipes.nmt.batches import Pair, collate
from recipes.nmt.module import Translator

RULES = {nn.LSTM: RevLSTM, nn.GRU: RevGRU}


def batches():
    """Two batches of ragged sentences."""
    generator = torch.Generator().manual_seed(0)

    def words(count):
        return torch.randint(4, 30, (count,), generator=generator).tolist()

    sizes = ([5, 7, 2], [9, 1, 4])
    return [collate([Pair(i, words(n), words(n + 1)) for i, n in enumerate(s)]) for s in sizes]


def models():
    """All models of the benchmark, small and untrained."""
    found = {}
    for name, (cell, memory) in translation.MODELS.items():
        torch.manual_seed(0)
        context = "embedding+slice:2" if cell.startswith("rev") else "hidden"
        sizes = {"embedding_size": 8, "hidden_size": 12, "context": context, "memory": memory}
        found[name] = Translator(30, 30, cell=cell.removeprefix("rev"), **sizes)
        if cell.startswith("rev"):
            convert(found[name], RULES, max_forget_bits=3.0)
    return found


@pytest.fixture(scope="module")
def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = translation.compare(models(), batches(), budget=0.0, rounds=1)
    torch.set_num_threads(threads)
    return {row["model"]: row for row in found}


def test_every_model_has_a_row_with_ratios_to_the_ordinary_ones(rows):
    assert list(rows) == list(translation.MODELS)
    for name, row in rows.items():
        same_cell = rows["nn.GRU" if "GRU" in name else "nn.LSTM"]
        assert row["cell"] in ("LSTM", "GRU", "RevLSTM", "RevGRU")
        for key, base in (("", rows["nn.LSTM"]), ("_same_cell", same_cell)):
            ratio = base["peak_bytes"] / row["peak_bytes"]
            assert row[f"peak_ratio{key}"] == pytest.approx(ratio)
            seconds = row["seconds_per_step"]["median"] / base["seconds_per_step"]["median"]
            assert row[f"time_ratio{key}"] == pytest.approx(seconds)


def test_states_are_counted_as_the_memory_report_counts_them_summed_over_batches(rows):
    model = models()["RevLSTM"]
    torch.manual_seed(0)
    expected = dict.fromkeys(translation.HALVES, 0.0)
    for batch in batches():
        translation.step(model, batch)
        for half in expected:
            expected[half] += memory_report(model).within(half).float_state_bits
    for half, bits in expected.items():
        counts = rows["RevLSTM"][half]
        assert counts["float_state_bits"] == bits
        for kind in ("stored", "information"):
            kept = counts[f"{kind}_bits"] + counts["slice_bits"]
            assert counts[f"{kind}_savings"] == pytest.approx(bits / kept)
    steps = sum(n for batch in batches() for n in batch.source_lengths)
    assert rows["RevLSTM"]["encoder"]["float_state_bits"] == 2 * 12 * 32 * steps
    assert rows["RevLSTM"]["encoder"]["slice_bits"] == 2 * 32 * steps
    assert rows["RevLSTM"]["decoder"]["slice_bits"] == 0
    assert "encoder" not in rows["nn.LSTM"]


def test_the_table_shows_every_model(rows):
    console = Console(width=160, record=True)
    console.print(translation.table(list(rows.values())))
    text = console.export_text()
    assert all(name in text for name in translation.MODELS)


# --- quality ---------------------------------------------------------------------------------


SETTINGS = {
    **{"source": "multi30k", "pair": "de-en", "min_count": 2},
    **{"size": "paper", "epochs": 10, "lr": 0.001},
}


@pytest.fixture
def trained(tmp_path):
    """What trainings and tests of two cells leave behind."""
    for cell, bleu in (("lstm", 30.0), ("revlstm", 29.5)):
        for task, rows in (
            ("fit", [(9, 20.0, 10.0), (19, 10.0, 25.0)]),
            ("test", [(20, 9.0, bleu)]),
        ):
            (tmp_path / cell).mkdir(exist_ok=True)
            (tmp_path / cell / f"{task}.json").write_text(json.dumps(SETTINGS))
            part = "val" if task == "fit" else "test"
            scores = ("perplexity", "bleu", "bleu_tokenized", "exact_match")
            names = ["step", *(f"{part}/{score}" for score in scores)]
            folder = tmp_path / cell / task
            folder.mkdir(parents=True)
            with (folder / "metrics.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(names)
                writer.writerows([step, perplexity, b, b, 0.5] for step, perplexity, b in rows)
    return tmp_path


def test_quality_reads_curves_and_test_scores_and_compares_them(trained, monkeypatch, tmp_path):
    (tmp_path / "recipes" / "nmt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["x", f"--folder={trained}", "--cells", "lstm", "revlstm"])
    threads = torch.get_num_threads()
    nmt_quality.main()
    torch.set_num_threads(threads)
    lstm, revlstm = json.loads((tmp_path / "nmt_quality.json").read_text())["rows"]
    assert lstm["val_perplexity"] == [[10, 20.0], [20, 10.0]]
    assert (lstm["test_bleu"], revlstm["test_bleu"]) == (30.0, 29.5)
    assert revlstm["test_bleu_difference"] == -0.5
    assert "test_bleu_difference" not in lstm
    assert (tmp_path / "recipes" / "nmt" / "nmt_quality.png").stat().st_size > 1000


def test_trainings_with_other_settings_are_not_taken_for_these(trained, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", f"--folder={trained}", "--epochs=3", "--cells", "lstm"])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match=r"fit.json was run with .*'epochs': 10.*another --folder"):
        nmt_quality.main()
    torch.set_num_threads(threads)


def test_a_training_without_its_one_checkpoint_is_named(trained):
    with pytest.raises(SystemExit, match=r"lstm/fit/checkpoints holds 0 checkpoints.*Run python"):
        nmt_quality.best_checkpoint("lstm", trained)


def test_quality_trains_as_a_user_would():
    options = argparse.Namespace(
        size="paper",
        epochs=2,
        lr=0.1,
        pair="de-en",
        min_count=2,
        source="multi30k",
        folder="runs",
        accelerator="auto",
    )
    call = nmt_quality.command("fit", "revgru", options)
    configs = [part.split("/")[-1] for part in call if part.startswith("--config")]
    assert configs == [f"{n}.yaml" for n in ("base", "paper", "gru", "emb20h", "rev3", "csv")]
    assert "--trainer.max_epochs=2" in call
