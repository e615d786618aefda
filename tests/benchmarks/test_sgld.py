"""The benchmarks of sampling measure what they say."""

import csv

import pytest

from benchmarks import mnist_posterior, sgld, sgld_prediction, sgld_steps
from lightning_revflip.sgld import SGLD, native


def test_steps_are_measured_beside_sgd() -> None:
    rows = {row["optimizer"]: row for row in sgld_steps.measure_steps(0.1)}
    assert rows["torch SGD"]["of_sgd"] == 1
    assert {"SGLD", "PSGLD", "SGHMC", "SGLD, torch's operations"} <= rows.keys()
    for row in rows.values():
        assert row["of_sgd"] == pytest.approx(rows["torch SGD"]["median"] / row["median"])


def test_the_row_without_compiled_steps_does_without_them(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(native, "call", lambda *_, **__: called.append(True))
    run = sgld_steps.training(sgld_steps.sampler(SGLD))
    sgld_steps._uncompiled(run)()
    assert not called
    if native.LIBRARY.available:
        run()
        assert len(called) == sgld_steps.EVERY


def test_collectors_are_measured_in_the_course_of_a_training() -> None:
    rows = {row["collector"]: row for row in sgld_steps.measure_collection(0.1, least=4)}
    assert {"bank, float16, spread", "deepcopy of a state_dict"} <= rows.keys()
    assert all(row["samples"] >= 4 for row in rows.values())
    ratios = [row["of_steps"] / row["mean"] for row in rows.values()]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))  # of the same steps


def test_prediction_is_measured_beside_a_loop_that_gives_the_same() -> None:
    rows = sgld_prediction.measure_prediction(0.1)
    assert [row["batch"] for row in rows] == list(sgld_prediction.BATCHES)
    for row in rows:
        assert row["speedup"] == pytest.approx(row["loop"]["median"] / row["predict"]["median"])


def test_every_part_can_be_asked_for() -> None:
    assert set(sgld.PARTS) == {"steps", "collection", "prediction"}


def test_figures_of_a_run_are_those_it_logged_last(tmp_path) -> None:
    for seed, accuracy in ((0, 0.9), (1, 0.8)):
        folder = tmp_path / f"sgd-{seed}" / "version_1"
        folder.mkdir(parents=True)
        (folder.parent / "seconds").write_text("12.5")
        with (folder / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, ["posterior/accuracy", "posterior/nll"])
            writer.writeheader()
            writer.writerow({"posterior/accuracy": "0.1", "posterior/nll": "0.2"})
            writer.writerow({"posterior/accuracy": str(accuracy)})
    rows = [mnist_posterior.read("sgd", seed, tmp_path) for seed in (0, 1)]
    assert rows[0] == {"run": "sgd", "seed": 0, "seconds": 12.5, "accuracy": 0.9, "nll": 0.2}
    assert [row["accuracy"] for row in rows] == [0.9, 0.8]
    cells = mnist_posterior.table(rows).columns[1]._cells
    assert cells == ["0.85 ± 0.07071"]


def test_every_run_names_configurations_that_there_are() -> None:
    for names in mnist_posterior.RUNS.values():
        assert all((mnist_posterior.CONFIGS / f"{name}.yaml").exists() for name in names)
