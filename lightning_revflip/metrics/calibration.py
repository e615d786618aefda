"""Expected calibration error of an ensemble."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from lightning_revflip.posterior.uncertainty import checked_probabilities


class EnsembleCalibrationError(MulticlassCalibrationError):
    """Expected calibration error of the mean prediction of posterior samples (Guo et al., 2017).

    Examples fall into bins of equal width by the largest probability of their mean prediction; the
    error is the mean distance of probability and accuracy in a bin, weighted by its examples.

    Args:
        num_classes: number of classes, C.
        n_bins: number of bins.
        kwargs: arguments of torchmetrics' MulticlassCalibrationError.

    Examples:
        >>> import torch
        >>> metric = EnsembleCalibrationError(num_classes=2)
        >>> probs = torch.tensor([[[0.9, 0.1]], [[0.7, 0.3]]])  # two samples, one example
        >>> metric.update(probs, torch.tensor([0]))
        >>> metric.compute()
        tensor(0.2000)
    """

    def __init__(self, num_classes: int, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(num_classes, n_bins=n_bins, **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in some examples.

        Args:
            preds: class probabilities of S posterior samples, shape (S, N, C), rows sum to 1.
            target: classes, shape (N,).

        Raises:
            ValueError: for another number of dimensions, NaN, and rows that are no probabilities.
        """
        # torchmetrics takes values above 1 for logits, and rounding may put a mean there.
        mean = checked_probabilities(preds).mean(0).float().clamp_max(1)
        super().update(mean, target)
