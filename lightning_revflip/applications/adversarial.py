"""How a predictor fares under attack: what it still gets right, and whether it notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revflip.applications.anomaly import detection
from lightning_revflip.applications.attacks import Attack, fgsm
from lightning_revflip.applications.predictors import (
    Predictor,
    batches,
    check_predictor,
    device_of,
)
from lightning_revflip.applications.tables import markdown_table
from lightning_revflip.posterior.uncertainty import negative_log_likelihood


@dataclass(frozen=True)
class UnderAttack:
    """Predictions for inputs that were changed by an attack of one size.

    Attributes:
        epsilon: largest change.
        accuracy: of the mean prediction.
        nll: mean negative log of the mean probability of the true class, in nats.
        auroc: by score, how well it tells changed inputs from the unchanged ones, all of them,
            misclassified or not; 0.5 is chance.
    """

    epsilon: float
    accuracy: float
    nll: float
    auroc: dict[str, float]


@dataclass(frozen=True)
class AdversarialReport:
    """Predictions under attack, by the size of the attack.

    Attributes:
        rows: one for each epsilon.
        networks: how many networks made the predictions.
        size: number of inputs.
    """

    rows: tuple[UnderAttack, ...]
    networks: int
    size: int

    def table(self) -> str:
        """A Markdown table, a row for each epsilon; accuracy and AUROC in percent."""
        return markdown_table(
            ["epsilon", "accuracy", "nll", *(f"AUROC {name}" for name in self.rows[0].auroc)],
            [
                [
                    f"{row.epsilon:g}",
                    f"{100 * row.accuracy:.1f}",
                    f"{row.nll:.3f}",
                    *(f"{100 * value:.1f}" for value in row.auroc.values()),
                ]
                for row in self.rows
            ],
        )

    def metrics(self) -> dict[str, float]:
        """All numbers by name: `accuracy/<epsilon>`, `nll/<epsilon>`, `auroc/<score>/<epsilon>`."""
        values = {}
        for row in self.rows:
            values[f"accuracy/{row.epsilon:g}"] = row.accuracy
            values[f"nll/{row.epsilon:g}"] = row.nll
            for score, auroc in row.auroc.items():
                values[f"auroc/{score}/{row.epsilon:g}"] = auroc
        return values


def under_attack(
    victim: Predictor,
    inputs: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    attack: Attack = fgsm,
    *,
    source: Predictor | None = None,
    batch_size: int = 500,
) -> AdversarialReport:
    """Attack inputs with each epsilon, and measure the predictions for the results.

    Args:
        victim: the networks whose mean prediction is measured.
        inputs: that no network was trained on, shape (N, ...).
        labels: the true classes, int64, shape (N,).
        epsilons: sizes of the attack; 0 gives the unchanged inputs.
        attack: from predictor, inputs, true classes and epsilon to changed inputs: `fgsm`, or `pgd`
            with its settings, for example `functools.partial(pgd, steps=40, restarts=5)`.
        source: whose weaknesses the attack uses, instead of the victim's own: a transfer attack by
            one who has only a network like it. Must compute on the same device.
        batch_size: inputs at a time.

    Raises:
        ValueError: for no inputs or epsilons, different numbers of inputs and labels, and as the
            attack.
        TypeError: for a victim or source that is no predictor.

    Examples:
        >>> from lightning_revflip.applications import NetworkPredictor, under_attack
        >>> inputs, labels = torch.rand(20, 4), torch.arange(20) % 3
        >>> report = under_attack(NetworkPredictor(torch.nn.Linear(4, 3)), inputs, labels, [0, 0.1])
        >>> report.rows[0].auroc["predictive_entropy"], report.rows[1].nll > report.rows[0].nll
        (0.5, True)
    """
    check_predictor(victim, "victim")
    if source is not None:
        check_predictor(source, "source")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if len(inputs) == 0 or len(inputs) != len(labels) or not epsilons:
        raise ValueError(
            "an attack needs at least one epsilon and as many labels as inputs, at least one; got "
            f"{len(epsilons)} epsilons, {len(inputs)} inputs and {len(labels)} labels."
        )
    device = device_of(victim.module)
    parts = [
        (x.to(device), y.to(device))
        for x, y in zip(batches(inputs, batch_size), batches(labels, batch_size), strict=True)
    ]
    clean = torch.cat([victim(x).cpu() for x, _ in parts], dim=1)
    rows = []
    for epsilon in epsilons:
        changed = [attack(source or victim, x, y, epsilon) for x, y in parts]
        probs = torch.cat([victim(x).cpu() for x in changed], dim=1)
        rows.append(_row(epsilon, clean, probs, labels.cpu()))
    return AdversarialReport(tuple(rows), len(clean), len(inputs))


def _row(epsilon: float, clean: Tensor, attacked: Tensor, labels: Tensor) -> UnderAttack:
    predicted = attacked.double().mean(0).argmax(-1)
    return UnderAttack(
        epsilon=epsilon,
        accuracy=float((predicted == labels).double().mean()),
        nll=float(negative_log_likelihood(attacked, labels).mean()),
        auroc={name: found.auroc for name, found in detection(clean, attacked).items()},
    )
