"""Figures of how confident predictions are: whether rightly so, and on which images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Reliability(NamedTuple):
    """Confidence and accuracy in equal intervals of confidence.

    Attributes:
        share: of the images, float64, shape (bins,).
        confidence: mean of the interval's images, 0 where there are none.
        accuracy: of the interval's images, 0 where there are none.
    """

    share: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence against accuracy (Guo et al., 2017, arXiv 1706.04599).

    Args:
        probs: mean probabilities, shape (images, classes).
        labels: int64, shape (images,).
        bins: number of intervals between 0 and 1.
    """
    confidence, classes = probs.double().max(-1)
    places = (confidence * bins).long().clamp(max=bins - 1)
    count = places.bincount(minlength=bins).double()
    right = places.bincount((classes == labels).double(), minlength=bins)
    total = places.bincount(confidence, minlength=bins)
    return Reliability(count / len(labels), total / count.clamp(min=1), right / count.clamp(min=1))


def reliability_figure(found: Reliability) -> Figure:
    """Bars of accuracy over confidence; where all are on the diagonal, confidence is justified."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    bins = len(found.share)
    left = [i / bins for i in range(bins)]
    upper.bar(left, found.accuracy.tolist(), width=1 / bins, align="edge", edgecolor="white")
    upper.plot([0, 1], [0, 1], color="black", linestyle="dotted")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    error = (found.share * (found.accuracy - found.confidence).abs()).sum().item()
    upper.set_title(f"expected calibration error {error:.4f}")
    lower.bar(left, found.share.tolist(), width=1 / bins, align="edge", edgecolor="white")
    lower.set_ylabel("share")
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    return figure


def entropy_figure(entropies: Mapping[str, Tensor], classes: int, bins: int = 50) -> Figure:
    """Histograms of predictive entropy, one for each set of images.

    Args:
        entropies: name and entropies of each set, in nats, shape (images,).
        classes: number of classes, whose logarithm is the highest entropy.
        bins: number of intervals.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    highest = math.log(classes)
    edges = torch.linspace(0, highest, bins + 1)
    for name, entropy in entropies.items():
        places = (entropy / highest * bins).long().clamp(0, bins - 1)
        shares = places.bincount(minlength=bins) / len(entropy)
        axes.stairs(shares.numpy(), edges.numpy(), label=name, fill=True, alpha=0.5)
    axes.set_xlabel("predictive entropy (nats)")
    axes.set_ylabel("share of the images")
    axes.set_xlim(0, highest)
    axes.legend()
    return figure
