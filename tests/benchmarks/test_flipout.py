"""The flipout benchmarks measure what they say."""

import math

import pytest
import torch
from torch import nn

from benchmarks import flipout, flipout_evolution, flipout_large_batch, flipout_layers
from benchmarks.flipout_variance import ESTIMATORS, NETWORKS, gradient_variance, slope
from lightning_revflip.flipout import FlipoutLinear, Gaussian


def test_slope_is_the_exponent_of_a_power_law() -> None:
    batches = [1, 4, 16, 64]
    assert slope(batches, [3 / n for n in batches]) == pytest.approx(-1)
    assert slope(batches, [2.0] * 4) == pytest.approx(0)


def variances(estimator: str, batches: list[int]) -> list[float]:
    """By mean, of a network whose noise dominates."""
    found = []
    for batch in batches:
        torch.manual_seed(0)
        arguments = {"perturbation": Gaussian(0.3), "estimator": estimator}
        model = nn.Sequential(
            FlipoutLinear(20, 30, **arguments), nn.ReLU(), FlipoutLinear(30, 5, **arguments)
        )
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(2000, 20, generator=generator)
        labels = torch.randint(5, (2000,), generator=generator)
        found.append(gradient_variance(model, images, labels, batch, repeats=200)[0])
    return found


def test_variance_falls_as_of_independent_examples_by_flipout_and_flattens_when_shared() -> None:
    """Seeded; a slope from 200 repetitions at 5 batch sizes has a standard error of about 0.01."""
    batches = [1, 8, 64, 256, 1024]
    assert -1.05 < slope(batches, variances("flipout", batches)) < -0.95
    shared = variances("shared", batches)
    assert slope(batches[2:], shared[2:]) > -0.3


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_and_estimator_has_gradients(network) -> None:
    for estimator in ESTIMATORS:
        if network not in estimator.networks:
            continue
        model = NETWORKS[network](
            perturbation=Gaussian(0.1),
            base_perturbations=estimator.base_perturbations or 2,
            **estimator.arguments,
        )
        images, labels = torch.rand(8, 1, 28, 28), torch.randint(10, (8,))
        by_mean, by_rho = gradient_variance(model, images, labels, batch=2, repeats=3)
        assert by_mean > 0
        assert by_rho > 0


def test_layers_are_measured_beside_the_plain_ones() -> None:
    rows = flipout_layers.measure_layers(budget=0.0)
    assert [row["layer"].split()[0] for row in rows] == ["Linear", "Conv2d", "LSTM", "GRU"]
    assert all(math.isfinite(row["ratio"]["flipout"]) for row in rows)
    assert flipout_layers.table(rows).row_count == 4


def test_methods_of_evolution_are_timed_side_by_side(monkeypatch) -> None:
    monkeypatch.setattr(flipout_evolution, "EXAMPLES", [1])
    monkeypatch.setattr(
        flipout_evolution, "POPULATIONS", {name: [8] for name in flipout_evolution.METHODS}
    )
    rows = flipout_evolution.measure_evolution(budget=0.0)
    assert {row["method"] for row in rows} >= {
        "flipout",
        "independent copies (bmm)",
        "one at a time",
    }
    assert rows[0]["flipout_ratio"] == 1


def test_iterations_are_counted_until_the_loss_is_reached(monkeypatch) -> None:
    torch.manual_seed(0)
    labels = torch.randint(10, (200,))
    images = torch.zeros(200, 1, 28, 28)
    images.view(200, 784)[torch.arange(200), labels] = 1.0  # classes that are easy to tell apart
    monkeypatch.setattr(flipout_large_batch, "MAX_ITERATIONS", 60)
    found = flipout_large_batch.iterations(images, labels, "flipout", 64, 1e-2, seed=0)
    assert 5 <= found <= 60


def test_every_part_can_be_asked_for() -> None:
    assert set(flipout.PARTS) == {"layers", "variance", "large_batch", "evolution"}
