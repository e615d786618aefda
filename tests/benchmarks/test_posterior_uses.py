"""What posteriors are good for is measured for each of them."""

import pytest
import torch

from benchmarks import posterior_uses
from lightning_revflip.applications import NetworkPredictor, PosteriorPredictor
from recipes.mnist.batches import Batch
from recipes.mnist.module import Classifier


class Images:
    """A data module with a few noisy images."""

    def __init__(self, source: str) -> None:
        assert source == "mnist"

    def test_set(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        return Batch(torch.rand(30, 1, 28, 28, generator=generator), torch.arange(30) % 10)


def test_each_posterior_has_figures_of_anomalies_and_attacks(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("REVFLIP_DATA", raising=False)
    monkeypatch.setattr(posterior_uses, "HandwrittenDigits", Images)
    monkeypatch.setattr(posterior_uses, "OUTLIERS", 20)
    monkeypatch.setattr(posterior_uses, "ATTACKED", 10)
    network = Classifier((1, 28, 28), 10, network="mlp", hidden=[4])
    monkeypatch.setattr(
        posterior_uses, "predictors", lambda runs, seed: {"sgd": NetworkPredictor(network)}
    )
    (row,) = posterior_uses.measure_uses(tmp_path, 0)
    assert (row["posterior"], row["seed"]) == ("sgd", 0)
    assert 0 <= row["anomalies"]["uniform/auroc/predictive_entropy"] <= 1
    for attack in posterior_uses.ATTACKS:
        accuracy = [row[attack][f"accuracy/{epsilon:g}"] for epsilon in posterior_uses.EPSILONS]
        assert accuracy == sorted(accuracy, reverse=True)
        assert row[attack]["nll/0"] < row[attack]["nll/0.3"]
        assert row[attack]["auroc/predictive_entropy/0"] == pytest.approx(0.5)


def test_predictors_are_those_of_the_runs(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        posterior_uses.Classifier,
        "load_from_checkpoint",
        lambda path, **_: Classifier((1, 28, 28), 10, hidden=[4], dropout=0.5),
    )
    loaded = []
    monkeypatch.setattr(posterior_uses, "SampleBank", lambda path: loaded.append(path) or path)
    monkeypatch.setattr(posterior_uses, "distil", lambda bank, seed: bank)
    monkeypatch.setattr(posterior_uses, "PosteriorPredictor", lambda *_, **__: PosteriorPredictor)
    found = posterior_uses.predictors(tmp_path, 3)
    assert list(found) == ["sgd", "mc_dropout", "sgld", "apd"]
    assert loaded == [tmp_path / "sgld-3" / "version_0" / "posterior"]
