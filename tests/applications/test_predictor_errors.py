"""What is no predictor is refused by name, with the predictor that was probably meant."""

import re

import pytest
import torch
from torch import nn

from lightning_revflip.applications import (
    ActiveLearning,
    NetworkPredictor,
    Pool,
    PosteriorPredictor,
    detect_anomalies,
    fgsm,
    pgd,
    under_attack,
)
from tests.helpers.applications import FixedSamples, samples_around

NETWORK = nn.Linear(4, 3)
POSTERIOR = FixedSamples(samples_around(NETWORK, 2))
X, Y = torch.rand(6, 4), torch.arange(6) % 3
MISTAKES = {
    "posterior": (POSTERIOR, "got a FixedSamples. Give PosteriorPredictor(posterior, network)"),
    "network": (NETWORK, "got a Linear. Give NetworkPredictor(network)"),
    "path": ("runs/bank", "got a str. Give a NetworkPredictor,"),
}
CALLS = {
    "detect_anomalies": lambda given: detect_anomalies(given, X, {"noise": X}),
    "under_attack": lambda given: under_attack(given, X, Y, [0.1]),
    "source": lambda given: under_attack(NetworkPredictor(NETWORK), X, Y, [0.1], source=given),
    "fgsm": lambda given: fgsm(given, X, Y, 0.1),
    "pgd": lambda given: pgd(given, X, Y, 0.1, steps=2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_predictor_is_refused_with_the_one_that_was_meant(call, mistake):
    given, message = MISTAKES[mistake]
    with pytest.raises(TypeError, match=re.escape(message)):
        CALLS[call](given)


def test_arguments_of_predictors_in_the_wrong_order_are_refused():
    with pytest.raises(TypeError, match="computes with an nn.Module, got a FixedSamples"):
        PosteriorPredictor(NETWORK, POSTERIOR)
    with pytest.raises(TypeError, match=r"takes a Posterior.*got a str first.*SampleBank\(path\)"):
        PosteriorPredictor("runs/bank", NETWORK)
    with pytest.raises(TypeError, match="NetworkPredictor computes with an nn.Module"):
        NetworkPredictor(POSTERIOR)


@pytest.mark.parametrize("acquisition", ["entropy", "random"])
@pytest.mark.parametrize(
    ("trained", "error", "message"),
    [
        (POSTERIOR, TypeError, "what `train` returns must be a Predictor, got a FixedSamples"),
        (NETWORK, ValueError, r"shape \(samples, examples, classes\), got \(6, 3\)"),
    ],
    ids=["posterior", "network"],
)
def test_active_learning_refuses_what_does_not_predict(trained, error, message, acquisition):
    learning = ActiveLearning(
        lambda *_: trained,
        X,
        Y,
        Pool(6, [0, 1, 2]),
        acquisition=acquisition,
        labels_per_round=1,
        evaluate={"all": (X, Y)},
    )
    with pytest.raises(error, match=message):
        learning.step()
