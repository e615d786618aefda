"""How uncertain the predictions of posterior samples are: pure functions of class probabilities.

All take probabilities of S samples for N examples and C classes, shape (S, N, C), and return one
number an example, shape (N,). Entropies are in nats, with 0 log 0 = 0, and summed in float64:
mutual information is a small difference of two of them. `negative_log_likelihood` also takes the
true classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def predictive_entropy(probs: Tensor) -> Tensor:
    """Entropy of the mean prediction, the total uncertainty.

    H(E_w p(y | x, w))

    Args:
        probs: class probabilities of S posterior samples, shape (S, N, C), rows sum to 1.

    Returns:
        Shape (N,), in nats, from 0 to log C.

    Raises:
        ValueError: for another number of dimensions, NaN, and rows that are no probabilities.

    Examples:
        >>> agreed, opposed = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])
        >>> probs = torch.stack([agreed, opposed], 1)  # two samples, two examples
        >>> predictive_entropy(probs)
        tensor([0.0000, 0.6931])
    """
    return _entropy(checked_probabilities(probs).mean(0)).to(_result_dtype(probs))


def expected_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of the samples' predictions, the uncertainty that more data would not remove.

    E_w H(p(y | x, w))

    Args:
        probs: as for `predictive_entropy`.

    Returns:
        Shape (N,), in nats, at most the predictive entropy.

    Raises:
        ValueError: as `predictive_entropy`.
    """
    return _entropy(checked_probabilities(probs)).mean(0).to(_result_dtype(probs))


def mutual_information(probs: Tensor) -> Tensor:
    """Mutual information between prediction and parameters (BALD).

    I[y; w | x] = H(E_w p(y | x, w)) - E_w H(p(y | x, w))          (Houlsby et al., 2011)

    Args:
        probs: as for `predictive_entropy`.

    Returns:
        Shape (N,), in nats; 0 means that all samples agree.

    Raises:
        ValueError: as `predictive_entropy`.
    """
    wide = checked_probabilities(probs)
    information = _entropy(wide.mean(0)) - _entropy(wide).mean(0)
    return information.clamp_min(0).to(_result_dtype(probs))  # less than 0 only by rounding


def variation_ratio(probs: Tensor) -> Tensor:
    """Share of the samples that do not vote for the class that most of them vote for.

    1 - max_c |{s : argmax_k p_s(k) = c}| / S                      (Gal, 2016, section 3.3.1)

    A sample votes for its most probable class, the first of several.

    Args:
        probs: as for `predictive_entropy`.

    Returns:
        Shape (N,), from 0, all agree, to 1 - 1 / min(S, C).

    Raises:
        ValueError: as `predictive_entropy`.
    """
    votes = checked_probabilities(probs).argmax(-1)
    counts = votes.new_zeros(probs.shape[1:])
    counts.scatter_add_(1, votes.T, torch.ones_like(votes.T))
    outvoted: Tensor = len(probs) - counts.amax(1)
    return outvoted.to(_result_dtype(probs)) / len(probs)


def max_probability(probs: Tensor) -> Tensor:
    """Largest class probability of the mean prediction: how confident the ensemble is.

    Args:
        probs: as for `predictive_entropy`.

    Returns:
        Shape (N,), from 1 / C to 1.

    Raises:
        ValueError: as `predictive_entropy`.
    """
    return checked_probabilities(probs).mean(0).amax(-1).to(_result_dtype(probs))


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> Tensor:
    """Negative log of the mean probability of the true class.

    -log E_w p(y | x, w)

    Probabilities below the smallest normal number of float32 count as that number: softmax rounds
    them to 0, and one confident mistake would make a mean over examples infinite.

    Args:
        probs: as for `predictive_entropy`.
        labels: true classes, int64, shape (N,).

    Returns:
        Shape (N,), in nats, from 0 to 87.4; float64, where the device has it.

    Raises:
        ValueError: as `predictive_entropy`, and for labels of another shape or dtype, or of no
            class.

    Examples:
        >>> probs = torch.tensor([[[0.8, 0.2]], [[0.2, 0.8]]])  # two samples, one example
        >>> negative_log_likelihood(probs, torch.tensor([0]))
        tensor([0.6931], dtype=torch.float64)
    """
    mean = checked_probabilities(probs).mean(0)
    examples, classes = mean.shape
    if labels.shape != (examples,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64, one for each of {examples} examples, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}."
        )
    if examples and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    likelihood = mean.gather(1, labels.to(mean.device).unsqueeze(1)).squeeze(1)
    return -likelihood.clamp_min(torch.finfo(torch.float32).tiny).log()


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probs).sum(-1)
    return entropy


def _result_dtype(probs: Tensor) -> torch.dtype:
    return torch.promote_types(probs.dtype, torch.float32)


def checked_probabilities(probs: Tensor) -> Tensor:
    """The probabilities in float64, where the device has it.

    Args:
        probs: as for `predictive_entropy`.

    Raises:
        ValueError: as `predictive_entropy`.
    """
    if probs.dim() != 3 or 0 in (probs.shape[0], probs.shape[2]):
        raise ValueError(
            "probs must have the shape (samples, examples, classes), with at least one sample and "
            f"class, got {tuple(probs.shape)}. Use probs.unsqueeze(0) for one sample."
        )
    if not probs.is_floating_point():
        raise ValueError(f"probs must be floating-point probabilities, got {probs.dtype}.")
    wide = probs.to(torch.float32 if probs.device.type == "mps" else torch.float64)
    error = (wide.sum(-1) - 1).abs()
    tolerance = max(1e-4, probs.shape[2] * torch.finfo(probs.dtype).eps)
    if not (error <= tolerance).all():
        if wide.isnan().any():
            raise ValueError("probs has NaN: did the model diverge, or do its inputs have NaN?")
        raise ValueError(
            "probs must sum to 1 over the last dimension, got sums that are off by up to "
            f"{error.max():.3g}. Are they logits? Use logits.softmax(-1)."
        )
    if (wide < 0).any():
        raise ValueError(f"probs must not be negative, got {wide.min():.3g}.")
    return wide
