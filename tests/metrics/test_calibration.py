"""The calibration error of an ensemble is that of its mean prediction."""

import pickle

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from lightning_revflip.metrics import EnsembleCalibrationError


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(6, 200, 4, generator=generator)).softmax(-1)
    return probs, torch.randint(4, (200,), generator=generator)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_value_is_that_of_the_mean_prediction(data, n_bins):
    probs, target = data
    metric, expected = (
        kind(num_classes=4, n_bins=n_bins)
        for kind in (EnsembleCalibrationError, MulticlassCalibrationError)
    )
    for part, classes in zip(probs.split(70, dim=1), target.split(70), strict=True):
        metric.update(part, classes)
    expected.update(probs.mean(0), target)
    torch.testing.assert_close(metric.compute(), expected.compute())


def test_certain_predictions_are_not_taken_for_logits():
    """A probability that rounding puts above 1 is not pushed through a softmax."""
    probs = torch.tensor([[[1 + 1e-6, 0, 0]], [[1 + 1e-6, 0, 0]]])
    metric = EnsembleCalibrationError(num_classes=3)
    metric.update(probs, torch.tensor([0]))
    assert metric.compute() == 0


def test_reset_forgets_and_pickling_keeps(data):
    probs, target = data
    metric = EnsembleCalibrationError(num_classes=4)
    metric.update(probs, target)
    value = metric.compute()
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), value)
    metric.reset()
    metric.update(probs, target)
    torch.testing.assert_close(metric.compute(), value)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.full((5, 4), 0.25), r"shape \(samples, examples, classes\)"),
        (torch.randn(3, 5, 4), "Are they logits"),
        (torch.full((3, 5, 2), 0.5), "preds.shape"),
    ],
    ids=["dimensions", "logits", "classes"],
)
def test_what_is_no_prediction_of_samples_is_refused(probs, message):
    with pytest.raises(ValueError, match=message):
        EnsembleCalibrationError(num_classes=4).update(probs, torch.zeros(5, dtype=torch.long))
