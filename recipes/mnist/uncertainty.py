"""What a predictive distribution is worth: how right it is, and how uncertain, and where."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_revflip import applications
from lightning_revflip.metrics import EnsembleCalibrationError
from lightning_revflip.posterior.uncertainty import (
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
)

ALONE = {"sync_on_compute": False}
"""The numbers are of the images given here, whether or not other processes have some as well."""


def quality(probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Accuracy, negative log-likelihood and calibration error of the mean prediction.

    Args:
        probs: probabilities, shape (networks, images, classes).
        labels: int64, shape (images,).

    Returns:
        `accuracy`; `nll`, in nats per image; `ece` over 15 bins of confidence.
    """
    predicted = probs.double().mean(0).argmax(-1)
    calibration = EnsembleCalibrationError(probs.shape[-1], n_bins=15, **ALONE)
    calibration.update(probs, labels)
    return {
        "accuracy": (predicted == labels).double().mean(),
        "nll": negative_log_likelihood(probs, labels).mean(),
        "ece": calibration.compute(),
    }


def detection(test: Tensor, outliers: Tensor) -> dict[str, Tensor]:
    """How well outliers are told from test images, by each score.

    AUPR depends on how many there are of either. So there are as many of the one as of the other:
    of the larger set, images at equal distances.

    Args:
        test: probabilities of the test images, shape (networks, images, classes).
        outliers: probabilities of the outliers, in the same shape.

    Returns:
        `auroc/<score>`, `aupr_in/<score>`, `aupr_out/<score>` and `fpr95/<score>`, as
        `OutOfDistributionDetection` defines them; mutual information and variation ratio only of
        several networks.
    """
    size = min(test.shape[1], outliers.shape[1])
    found = applications.detection(evenly_spaced(test, size), evenly_spaced(outliers, size))
    return {
        f"{kind}/{score}": torch.tensor(value)
        for score, values in found.items()
        for kind, value in values._asdict().items()
    }


def evenly_spaced(probs: Tensor, size: int) -> Tensor:
    """The probabilities of `size` images at equal distances.

    >>> evenly_spaced(torch.arange(6.0).view(1, 6, 1), 3).flatten()
    tensor([0., 2., 4.])
    """
    images = probs.shape[1]
    return probs[:, torch.arange(size) * images // size]


def summary(probs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor | float]:
    """All numbers of a prediction.

    Args:
        probs: probabilities (networks, images, classes) of the `test` and, if any, the `outliers`.
        labels: of the test images, int64.

    Returns:
        `samples`, the number of networks; what `quality` and `detection` return; and the means
        `predictive_entropy_<images>` and, of several networks, `mutual_information_<images>`.
    """
    networks = len(probs["test"])
    values: dict[str, Tensor | float] = {"samples": float(networks)}
    values |= quality(probs["test"], labels)
    for name, each in probs.items():
        values[f"predictive_entropy_{name}"] = predictive_entropy(each).mean()
        if networks > 1:
            values[f"mutual_information_{name}"] = mutual_information(each).mean()
    if "outliers" in probs:
        values |= detection(probs["test"], probs["outliers"])
    return values
