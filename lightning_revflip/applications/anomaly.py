"""How well uncertain predictions give away inputs that are none of the classes.

Wang et al. (2018), arXiv 1806.10317, section 4.3; Hendrycks and Gimpel (2017), arXiv 1610.02136.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_revflip.applications.predictors import Predictor, check_predictor, in_batches
from lightning_revflip.applications.tables import markdown_table
from lightning_revflip.metrics import OutOfDistributionDetection
from lightning_revflip.posterior.uncertainty import (
    max_probability,
    mutual_information,
    predictive_entropy,
    variation_ratio,
)

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "predictive_entropy": predictive_entropy,
    "max_probability": lambda probs: 1 - max_probability(probs),
    "mutual_information": mutual_information,
    "variation_ratio": variation_ratio,
}
"""Scores of probabilities (networks, N, classes), shape (N,): higher where anomalies are likely."""

SCORES_OF_SEVERAL = ("mutual_information", "variation_ratio")
"""Scores that are 0 for every input if there is only one network."""


class Detection(NamedTuple):
    """How well a score tells anomalies, as `OutOfDistributionDetection` defines the numbers."""

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float


@dataclass(frozen=True)
class AnomalyReport:
    """How well each score tells each kind of anomalies from the data.

    Attributes:
        detections: by kind of anomalies, then by score.
        sizes: of each kind, how many anomalies, and as many inputs of the data.
        networks: how many networks made the predictions.
        scale: what all inputs were multiplied by.
    """

    detections: dict[str, dict[str, Detection]]
    sizes: dict[str, int]
    networks: int
    scale: float

    def table(self) -> str:
        """A Markdown table, a row for each kind and score, in percent."""
        return markdown_table(
            ["anomalies", "score", "AUROC", "AUPR in", "AUPR out", "FPR95"],
            [
                [kind, score, *(f"{100 * value:.1f}" for value in found)]
                for kind, scores in self.detections.items()
                for score, found in scores.items()
            ],
            names=2,
        )

    def metrics(self) -> dict[str, float]:
        """All numbers by the name `<kind>/<number>/<score>`, for example `noise/auroc/...`."""
        return {
            f"{kind}/{name}/{score}": value
            for kind, scores in self.detections.items()
            for score, found in scores.items()
            for name, value in found._asdict().items()
        }


def anomaly_scores(probs: Tensor) -> dict[str, Tensor]:
    """The scores of predictions by name, those of `SCORES_OF_SEVERAL` only of several networks.

    Args:
        probs: probabilities, shape (networks, N, classes).

    Returns:
        Shape (N,) each.

    Raises:
        ValueError: as for `predictive_entropy`.
    """
    return {
        name: score(probs)
        for name, score in SCORES.items()
        if len(probs) > 1 or name not in SCORES_OF_SEVERAL
    }


def detection(inside: Tensor, outside: Tensor) -> dict[str, Detection]:
    """How well each score tells some inputs from others.

    The areas under precision-recall curves depend on how many there are of either: give equal
    numbers.

    Args:
        inside: probabilities of inputs of the data, shape (networks, N, classes).
        outside: probabilities of anomalies, shape (networks, M, classes).

    Returns:
        By the name of the score, those of `anomaly_scores`.

    Raises:
        ValueError: as `anomaly_scores`, and if either has no inputs.
    """
    of_inside, of_outside = anomaly_scores(inside), anomaly_scores(outside)
    found = {}
    for name, scores in of_inside.items():
        # These inputs are all there are, whether or not other processes have some as well.
        metric = OutOfDistributionDetection(sync_on_compute=False)
        metric.update(scores, torch.zeros(len(scores), dtype=torch.bool))
        others = of_outside[name]
        metric.update(others, torch.ones(len(others), dtype=torch.bool))
        found[name] = Detection(**{key: float(value) for key, value in metric.compute().items()})
    return found


def detect_anomalies(
    predict: Predictor,
    inside: Tensor,
    outside: Mapping[str, Tensor],
    *,
    size: int = 2000,
    scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 1000,
) -> AnomalyReport:
    """Score inputs of the data and anomalies, and measure how well the scores tell them apart.

    Args:
        predict: the networks whose mean prediction is scored.
        inside: inputs of the data that no network was trained on, shape (N, ...).
        outside: anomalies by kind, each of shape (M, ...).
        size: so many of each side are drawn, fewer where there are fewer: always as many of the
            one as of the other.
        scale: factor of all inputs, on both sides, before the networks see them. Other than 1 it
            makes every network more or less certain than it was trained to be.
        seed: of what is drawn.
        batch_size: inputs that are predicted at a time.

    Raises:
        ValueError: for sizes below 1, a scale that is not positive, anomalies in another shape, or
            none.
        TypeError: for what is no predictor.

    Examples:
        >>> from lightning_revflip.applications import NetworkPredictor, detect_anomalies
        >>> data, noise = torch.ones(50, 4), 9 * torch.rand(50, 4)
        >>> report = detect_anomalies(NetworkPredictor(torch.nn.Linear(4, 3)), data, {"n": noise})
        >>> sorted(report.detections["n"]), report.sizes
        (['max_probability', 'predictive_entropy'], {'n': 50})
    """
    check_predictor(predict, "predict")
    if size < 1 or batch_size < 1:
        raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}.")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}.")
    if not outside:
        raise ValueError("outside has no kind of anomalies. Give at least one.")
    for kind, inputs in outside.items():
        if inputs.shape[1:] != inside.shape[1:] or len(inputs) == 0 or len(inside) == 0:
            raise ValueError(
                f"anomalies of the kind {kind!r} must have the shape (M, ...) of the data, "
                f"{tuple(inside.shape)}, each with at least one input, got {tuple(inputs.shape)}."
            )
    probs = in_batches(predict, scale * draw(inside, size, seed), batch_size)
    detections, sizes = {}, {}
    for kind, inputs in outside.items():
        drawn = draw(inputs, probs.shape[1], seed)
        sizes[kind] = len(drawn)
        found = in_batches(predict, scale * drawn, batch_size)
        detections[kind] = detection(probs[:, : len(drawn)], found)
    return AnomalyReport(detections, sizes, len(probs), scale)


def draw(inputs: Tensor, size: int, seed: int) -> Tensor:
    """Different inputs, drawn at random and in random order.

    Args:
        inputs: shape (N, ...).
        size: how many; all of them if there are no more.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    return inputs[torch.randperm(len(inputs), generator=generator)[:size]]
