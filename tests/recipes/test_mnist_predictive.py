"""Probabilities of several networks: the one under test, and passes with dropout."""

import math

import pytest
import torch
from torch import nn

from recipes.mnist.predictive import in_batches, predict_dropout, predict_network


def test_network_predicts_as_it_is():
    torch.manual_seed(0)
    network, images = nn.Linear(4, 3), torch.randn(5, 4)
    found = predict_network(network, images)
    scores = (images @ network.weight.T + network.bias).exp()
    torch.testing.assert_close(found, (scores / scores.sum(1, keepdim=True)).unsqueeze(0))
    assert not found.requires_grad


def test_passes_with_dropout_have_the_probabilities_of_dropped_units():
    """Two units of which each is dropped with probability 1/4 give four predictions."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.25), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    passes = predict_dropout(network, torch.ones(10, 2), passes=400)
    assert passes.shape == (400, 10, 2)
    # The first logit is (kept_1 + 2 kept_2) / 0.75, the second 0.
    shares = {0: 1 / 16, 1: 3 / 16, 2: 3 / 16, 3: 9 / 16}
    for kept, share in shares.items():
        expected = 1 / (1 + math.exp(-kept / 0.75))
        found = ((passes[..., 0] - expected).abs() < 1e-6).double().mean().item()
        # Of 4,000 draws; 5 standard errors.
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4000))
    # Images of one pass have masks of their own.
    assert (passes[:, 0] != passes[:, 1]).any()


@pytest.mark.parametrize("training", [True, False])
def test_normalisation_computes_as_in_evaluation_and_every_mode_is_restored(training):
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2))
    network.train(training)
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [part.training for part in network.modules()]

    images = torch.randn(6, 2) * 3 + 1
    passes = predict_dropout(network, images, passes=200)
    alone = predict_dropout(network, images[:1], passes=200)  # of one image no variance is known
    assert alone.isfinite().all()
    assert len(passes[:, 0].unique(dim=0)) == 4
    torch.testing.assert_close(passes[:, 0].unique(dim=0), alone[:, 0].unique(dim=0))
    assert [part.training for part in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.0))])
def test_network_without_dropout_is_explained(network):
    network.train()
    with pytest.raises(ValueError, match=r"needs a network with dropout.*--model\.dropout"):
        predict_dropout(network, torch.zeros(1, 2), passes=2)
    assert network.training


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_batches_make_up_the_whole(batch_size):
    images = torch.randn(5, 4)
    seen = []

    def predict(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return torch.stack([batch, 2 * batch])

    found = in_batches(predict, images, batch_size, torch.device("cpu"))
    assert torch.equal(found, torch.stack([images, 2 * images]))
    assert max(seen) <= batch_size
