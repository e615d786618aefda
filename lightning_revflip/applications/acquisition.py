"""Which examples to label next, by what a posterior predicts for them.

An acquisition function takes class probabilities of S posterior samples for N candidates, shape
(S, N, C), and picks some of the candidates. "random" needs no predictions, and is not among them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_revflip.posterior.uncertainty import (
    checked_probabilities,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    variation_ratio,
)

Acquisition = Callable[[Tensor, int, torch.Generator], Tensor]
"""Of probabilities (S, N, C), a number of picks and a CPU generator: which candidates, int64,
shape (picks,)."""


def highest(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The examples with the highest scores, the highest first; ties are broken at random.

    Args:
        scores: shape (N,).
        count: number of examples.
        generator: a CPU generator to draw from.

    Returns:
        int64, shape (count,).

    Raises:
        ValueError: for more examples than there are, and NaN.
    """
    _check_count(count, len(scores))
    if scores.isnan().any():
        raise ValueError("scores has NaN: did the model diverge, or do its inputs have NaN?")
    order = torch.randperm(len(scores), generator=generator)
    return order[scores.cpu()[order].argsort(descending=True, stable=True)[:count]]


def by_score(score: Callable[[Tensor], Tensor]) -> Acquisition:
    """An acquisition function that picks the candidates with the highest scores.

    Args:
        score: of probabilities (S, N, C), shape (N,), see `lightning_revflip.posterior`.
    """

    def acquire(probs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return highest(score(probs), count, generator)

    acquire.__name__ = score.__name__
    return acquire


def batch_bald(
    probs: Tensor, count: int, generator: torch.Generator, max_outcomes: int = 1000
) -> Tensor:
    """Greedily pick candidates whose labels together say most about the parameters.

    I[y_1, ..., y_b; w] = sum_i (E H(y_i | y_1, ..., y_{i-1}) - E_w H(y_i | w))

    (BatchBALD; Kirsch et al., 2019, arXiv 1906.08158.) Candidates that BALD scores alike because
    they are alike are not picked together. After i picks there are C^i outcomes of their labels;
    where these are more than `max_outcomes`, as many are drawn by their probability, and the first
    expectation is over them.

    Args:
        probs: class probabilities, shape (S, N, C).
        count: number of candidates to pick.
        generator: a CPU generator to draw from.
        max_outcomes: outcomes to compute with.

    Returns:
        int64, shape (count,), in the order of the picks.

    Raises:
        ValueError: for more picks than candidates, and as for `mutual_information`.
    """
    wide = checked_probabilities(probs).cpu()
    _check_count(count, wide.shape[1])
    noise = expected_entropy(wide)
    outcomes = _Outcomes(wide.shape[0])
    picked: list[int] = []
    for _ in range(count):
        gain = outcomes.expected_entropy(probs.float().cpu()) - noise
        gain[picked] = -torch.inf
        picked.append(int(highest(gain, 1, generator)))
        if len(picked) < count:
            outcomes.add(wide[:, picked[-1]], max_outcomes, generator)
    return torch.tensor(picked)


class _Outcomes:
    """Outcomes of labels: how probable each is, and what it says about the S samples."""

    def __init__(self, samples: int) -> None:
        self.weights = torch.ones(1, dtype=torch.float64)
        """Probabilities of K outcomes, or 1 / K each if they were drawn."""
        self.posterior = torch.full((1, samples), 1 / samples, dtype=torch.float64)
        """Probabilities of the samples given each outcome, shape (K, S)."""

    def expected_entropy(self, probs: Tensor, chunk_size: int = 64) -> Tensor:
        """Mean over the outcomes of the entropy of each candidate's label, shape (N,)."""
        samples, candidates, classes = probs.shape
        flat = probs.reshape(samples, candidates * classes)
        total = torch.zeros(candidates, dtype=torch.float64)
        outcomes = (self.weights, self.posterior)
        for weights, posterior in zip(*(torch.split(x, chunk_size) for x in outcomes), strict=True):
            given = posterior.to(probs.dtype) @ flat
            entropy = torch.special.entr(given).view(-1, candidates, classes).sum(-1)
            total += weights @ entropy.double()
        return total

    def add(self, probs: Tensor, max_outcomes: int, generator: torch.Generator) -> None:
        """Take account of one more label.

        Args:
            probs: its probabilities for each sample, shape (S, C).
            max_outcomes: draw so many outcomes, if there would be more.
            generator: to draw from.
        """
        joint = (self.posterior.unsqueeze(2) * probs).transpose(1, 2)  # outcome, label, sample
        given = joint.sum(2)
        weights = (self.weights.unsqueeze(1) * given).flatten()
        chosen = weights.nonzero().squeeze(1)
        weights = weights[chosen]
        if len(chosen) > max_outcomes:
            drawn = torch.multinomial(weights, max_outcomes, True, generator=generator)
            chosen = chosen[drawn]
            weights = torch.full((max_outcomes,), 1 / max_outcomes, dtype=torch.float64)
        self.weights = weights
        self.posterior = joint.flatten(0, 1)[chosen] / given.flatten()[chosen].unsqueeze(1)


ACQUISITIONS: dict[str, Acquisition] = {
    "entropy": by_score(predictive_entropy),
    "bald": by_score(mutual_information),
    "variation_ratio": by_score(variation_ratio),
    "batch_bald": batch_bald,
}
"""By name: the predictive entropy, the mutual information of prediction and parameters (BALD;
Houlsby et al., 2011), the variation ratio (Gal et al., 2017, arXiv 1703.02910), and BatchBALD."""


def _check_count(count: int, candidates: int) -> None:
    if not 1 <= count <= candidates:
        raise ValueError(f"cannot pick {count} of {candidates} candidates.")
