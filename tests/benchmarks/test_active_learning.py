"""What the benchmark of active learning makes of its rounds."""

import pytest
import torch

from benchmarks import active_learning
from benchmarks.active_learning import labels_needed, table, train
from lightning_revflip.applications import Round


def rounds(*accuracies: float | None) -> list[Round]:
    return [
        Round(20 + 10 * i, {} if each is None else {"test": each}, [])
        for i, each in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("accuracies", "needed"),
    [
        ((0.7, 0.8, 0.9), 30),
        ((0.9, 0.7, 0.8), 40),  # it must stay there
        ((0.7, None, 0.85, None), 40),
        ((0.9, 0.9), 20),
        ((0.7, 0.79), None),
    ],
)
def test_labels_that_an_accuracy_needs(accuracies, needed):
    assert labels_needed(rounds(*accuracies), 0.8) == needed


def test_table_shows_every_run():
    row = {"seed": 0, "labels": [20, 100], "accuracy": [0.5, 0.8]}
    row["labels_needed"] = {f"{target:.2f}": 100 for target in active_learning.TARGETS}
    shown = table([{"run": "a", **row}, {"run": "a", **row, "seed": 1}, {"run": "b", **row}])
    assert shown.row_count == 2


@pytest.mark.parametrize("posterior", ["network", "dropout", "sgld", "apd"])
def test_every_posterior_predicts_and_repeats(monkeypatch, posterior):
    monkeypatch.setattr(active_learning, "STEPS", 20)
    monkeypatch.setattr(active_learning, "BURN_IN", 10)
    monkeypatch.setattr(active_learning, "EVERY", 2)
    monkeypatch.setattr(active_learning, "SAMPLES", 5)
    monkeypatch.setattr(active_learning, "RANK", 2)
    monkeypatch.setattr(active_learning, "DISTILLATION_STEPS", 2)
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = [train(posterior, images, torch.arange(30) % 10, 3)(images) for _ in range(2)]
    assert found[0].shape == (1 if posterior == "network" else 5, 30, 10)
    assert found[0].equal(found[1])
