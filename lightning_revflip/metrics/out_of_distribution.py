"""How well a score tells examples that are out of the distribution from those in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat


class OutOfDistributionDetection(Metric):
    """Areas under curves, and an error rate, of a score that is high out of the distribution.

    Such a score is the predictive entropy, the mutual information, or 1 - the largest probability.
    Computed over all scores, exactly, examples of equal score together:

    - `auroc`: area under the receiver operating characteristic, the probability that an example
      out of the distribution scores higher than one in it (equal scores count half).
    - `aupr_out`, `aupr_in`: average precision with the examples out of, or in, the distribution as
      the positive class (Hendrycks and Gimpel, 2017). The share of the positive class is what a
      score that knows nothing reaches.
    - `fpr95`: share of the examples out of the distribution that pass for in it, at the lowest
      threshold on the score at which at least 95 % of the examples in the distribution pass. The
      positive class is in the distribution (Liang et al., 2018); 0 is best.

    Call `update` for each batch and `compute` at the end: a batch alone often has one class only.

    Args:
        kwargs: arguments of torchmetrics.Metric.

    Examples:
        >>> metric = OutOfDistributionDetection()
        >>> metric.update(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([False, False, True]))
        >>> metric.update(torch.tensor([0.3]), torch.tensor([True]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'auroc': 1.0, 'aupr_in': 1.0, 'aupr_out': 1.0, 'fpr95': 0.0}
    """

    is_differentiable = False
    full_state_update = False

    inside: list[Tensor]
    outside: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("inside", [], dist_reduce_fx="cat")
        self.add_state("outside", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, is_out: Tensor) -> None:
        """Take in some examples.

        Args:
            scores: shape (N,), high for examples out of the distribution; kept in float32.
            is_out: which are out of it, shape (N,), bool.

        Raises:
            ValueError: for other shapes or dtypes, and NaN.
        """
        if scores.dim() != 1 or scores.shape != is_out.shape:
            raise ValueError(
                "scores and is_out must have the same shape (N,), got "
                f"{tuple(scores.shape)} and {tuple(is_out.shape)}."
            )
        if is_out.dtype != torch.bool:
            raise ValueError(
                "is_out must be bool, True for examples out of the distribution, got "
                f"{is_out.dtype}. Use is_out.bool()."
            )
        if not scores.is_floating_point():
            raise ValueError(f"scores must be floating-point numbers, got {scores.dtype}.")
        if scores.isnan().any():
            raise ValueError("scores has NaN: did the model diverge, or do its inputs have NaN?")
        scores = scores.to(self.dtype)  # that of a process without examples, too
        self.inside.append(scores[~is_out])
        self.outside.append(scores[is_out])

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name: `auroc`, `aupr_in`, `aupr_out`, `fpr95`.

        Raises:
            ValueError: unless there are examples of both kinds.
        """
        inside, outside = _joined(self.inside), _joined(self.outside)
        if len(inside) == 0 or len(outside) == 0:
            raise ValueError(
                "detection needs examples in and out of the distribution, got "
                f"{len(inside)} in and {len(outside)} out of it. Update with both, and call "
                "update(), not the metric itself, on batches of one kind."
            )
        scores = torch.cat([inside, outside])
        is_out = torch.arange(len(scores), device=scores.device) >= len(inside)
        out_first, in_first = _Counts.of(scores, is_out), _Counts.of(-scores, ~is_out)
        values = {
            "auroc": out_first.area(),
            "aupr_in": in_first.average_precision(),
            "aupr_out": out_first.average_precision(),
            "fpr95": in_first.false_positive_rate(percent=95),
        }
        return {name: value.float() for name, value in values.items()}


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    """All scores: a list, or what processes gathered."""
    return dim_zero_cat(parts) if len(parts) else torch.empty(0)


class _Counts(NamedTuple):
    """True and false positives at each threshold, from the highest score to the lowest."""

    true: Tensor
    false: Tensor

    @classmethod
    def of(cls, scores: Tensor, positive: Tensor) -> _Counts:
        scores, order = scores.sort(descending=True)
        last_of_equals = torch.ones_like(positive)
        last_of_equals[:-1] = scores[1:] != scores[:-1]
        true = positive[order].cumsum(0)[last_of_equals]
        false = (~positive)[order].cumsum(0)[last_of_equals]
        return cls(true, false)

    def area(self) -> Tensor:
        """Under the receiver operating characteristic."""
        height, width = _with_start(self.true), _with_start(self.false).diff()
        twice = ((height[1:] + height[:-1]) * width).sum()  # exact, in whole numbers
        return twice.double() / (2 * self.true[-1] * self.false[-1])

    def average_precision(self) -> Tensor:
        """Sum over thresholds of precision times the gain in recall."""
        precision = self.true.double() / (self.true + self.false)
        return (precision * _with_start(self.true).diff()).sum() / self.true[-1]

    def false_positive_rate(self, percent: int) -> Tensor:
        """At the first threshold with a true positive rate of at least `percent`."""
        first = int((100 * self.true >= percent * self.true[-1]).int().argmax())
        return self.false[first].double() / self.false[-1]


def _with_start(counts: Tensor) -> Tensor:
    """From 0, above the highest score."""
    return torch.cat([counts.new_zeros(1), counts])
