"""Accuracy under attack and detection, by epsilon, of the victim's own weaknesses and others'."""

import functools

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from lightning_revflip.applications import (
    NetworkPredictor,
    PosteriorPredictor,
    fgsm,
    pgd,
    under_attack,
)
from tests.helpers.applications import FixedSamples, images, network, samples_around


def predicted_by(predictor, inputs):
    """Labels that the predictor gets right."""
    return predictor(inputs).mean(0).argmax(-1)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_rows_are_what_attacking_and_scoring_by_hand_gives(batch_size):
    module, (inputs, labels) = network(), images(40)
    bank = PosteriorPredictor(FixedSamples(samples_around(module, 5)), module)
    report = under_attack(bank, inputs, labels, [0, 0.05], batch_size=batch_size)
    assert (report.networks, report.size) == (5, 40)
    clean, attacked = bank(inputs), bank(fgsm(bank, inputs, labels, 0.05))
    for row, probs in zip(report.rows, (clean, attacked), strict=True):
        mean = probs.double().mean(0)
        assert row.accuracy == pytest.approx((mean.argmax(-1) == labels).double().mean().item())
        assert row.nll == pytest.approx(nn.NLLLoss()(mean.log(), labels).item(), rel=1e-5)
    entropies = [-(p.mean(0) * p.mean(0).log()).sum(-1) for p in (clean, attacked)]
    expected = roc_auc_score([0] * 40 + [1] * 40, torch.cat(entropies).numpy())
    assert report.rows[1].auroc["predictive_entropy"] == pytest.approx(expected, abs=1e-3)


def test_unchanged_inputs_cannot_be_told_from_themselves():
    module, (inputs, labels) = network(), images(20)
    bank = PosteriorPredictor(FixedSamples(samples_around(module, 3)), module)
    (row,) = under_attack(bank, inputs, labels, [0]).rows
    assert set(row.auroc.values()) == {0.5}
    assert len(row.auroc) == 4


def test_accuracy_falls_with_epsilon():
    predictor, (inputs, _) = NetworkPredictor(network()), images(60)
    labels = predicted_by(predictor, inputs)
    attack = functools.partial(pgd, steps=5, generator=torch.Generator().manual_seed(0))
    rows = under_attack(predictor, inputs, labels, [0, 0.01, 0.05, 0.2], attack).rows
    accuracies = [row.accuracy for row in rows]
    assert accuracies[0] == 1
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 0.1
    assert [row.nll for row in rows] == sorted(row.nll for row in rows)


def test_transferred_attack_uses_the_weaknesses_of_its_source():
    victim, source = NetworkPredictor(network(seed=0)), NetworkPredictor(network(seed=1))
    inputs, _ = images(60)
    labels = predicted_by(victim, inputs)
    (own,) = under_attack(victim, inputs, labels, [0.1]).rows
    (transferred,) = under_attack(victim, inputs, labels, [0.1], source=source).rows
    (same,) = under_attack(victim, inputs, labels, [0.1], source=victim).rows
    assert same == own
    assert own.accuracy < transferred.accuracy
    expected = predicted_by(victim, fgsm(source, inputs, labels, 0.1)) == labels
    assert transferred.accuracy == pytest.approx(expected.double().mean().item())


def test_report_names_its_numbers():
    inputs, labels = images(20)
    report = under_attack(NetworkPredictor(network()), inputs, labels, [0, 0.15])
    row = report.rows[1]
    found = report.metrics()
    assert found["accuracy/0.15"] == row.accuracy
    assert found["auroc/max_probability/0.15"] == row.auroc["max_probability"]
    assert len(found) == 2 * (2 + 2)
    header, _, _, last = report.table().splitlines()
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["epsilon", "accuracy", "nll"]
    assert [cell.strip() for cell in last.split("|")[1:3]] == ["0.15", f"{100 * row.accuracy:.1f}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilons": []}, "0 epsilons"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "5 inputs and 3 labels"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epsilons": [0.1, 2]}, "epsilon must be from 0 to 1"),
    ],
    ids=["no epsilon", "labels", "batch_size", "epsilon"],
)
def test_settings_that_make_no_sense_are_rejected(settings, message):
    inputs, labels = images(5)
    settings = {"inputs": inputs, "labels": labels, "epsilons": [0.1], **settings}
    with pytest.raises(ValueError, match=message):
        under_attack(NetworkPredictor(network()), **settings)
