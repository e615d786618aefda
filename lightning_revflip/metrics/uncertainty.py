"""Mean uncertainty over a data set, by the formulas of `posterior/uncertainty.py`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_revflip.posterior.uncertainty import (
    mutual_information,
    predictive_entropy,
    variation_ratio,
)


class _MeanUncertainty(Metric):
    """The mean over all examples of a function of the probabilities (S, N, C)."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    examples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("examples", torch.tensor(0), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def uncertainty(probs: Tensor) -> Tensor:
        """Of each example, shape (N,)."""

    def update(self, probs: Tensor) -> None:
        """Take in some examples.

        Args:
            probs: class probabilities of S posterior samples, shape (S, N, C), rows sum to 1.

        Raises:
            ValueError: for another number of dimensions, NaN, and rows that are no probabilities.
        """
        uncertainty = self.uncertainty(probs)
        self.total += uncertainty.sum()
        self.examples += len(uncertainty)

    def compute(self) -> Tensor:
        """The mean, a scalar; NaN without examples."""
        return self.total / self.examples


class PredictiveEntropy(_MeanUncertainty):
    """Mean entropy of the mean prediction, in nats: the total uncertainty.

    Args:
        kwargs: arguments of torchmetrics.Metric.

    Examples:
        >>> metric = PredictiveEntropy()
        >>> metric.update(torch.full((20, 8, 10), 0.1))
        >>> metric.compute()
        tensor(2.3026)
    """

    uncertainty = staticmethod(predictive_entropy)


class MutualInformation(_MeanUncertainty):
    """Mean mutual information between prediction and parameters (BALD), in nats.

    Args:
        kwargs: arguments of torchmetrics.Metric.

    Examples:
        >>> metric = MutualInformation()
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> metric.compute()
        tensor(0.6931)
    """

    uncertainty = staticmethod(mutual_information)


class VariationRatio(_MeanUncertainty):
    """Mean share of the samples that do not vote for the class that most of them vote for.

    Args:
        kwargs: arguments of torchmetrics.Metric.

    Examples:
        >>> metric = VariationRatio()
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    uncertainty = staticmethod(variation_ratio)
