"""The evidence lower bound: divergence from the prior of all weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from lightning_revflip.flipout.layer import PerturbedLayer, PerturbedWeight
from lightning_revflip.flipout.perturbations import Perturbation
from lightning_revflip.flipout.sampling import flipout_layers

WeightWithPrior = tuple[Perturbation, PerturbedWeight]

_WEIGHTS_SAMPLED = 65_536
"""How many weights a median is taken of, at most twice as many."""


def kl(model: nn.Module) -> Tensor:
    """Divergence of the weights' distribution from their prior, an exact sum in nats.

    Every perturbed weight that has a prior counts once, also where layers share it. Differentiable.

    Args:
        model: holds flipout layers.

    Raises:
        ValueError: if no weight has a prior.

    Examples:
        >>> from lightning_revflip.flipout import FlipoutLinear, Gaussian
        >>> layer = FlipoutLinear(2, 1, perturbation=Gaussian(init_std=1.0, prior_std=1.0))
        >>> torch.allclose(kl(layer), layer.weight.square().sum() / 2, atol=1e-5)
        True
    """
    terms = [
        term
        for perturbation, weight in _weights_with_prior(model)
        if (term := perturbation.kl(weight.mean, *weight.spread)) is not None
    ]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def elbo_loss(nll: Tensor, model: nn.Module, num_data: int, kl_weight: float = 1.0) -> Tensor:
    """The negative evidence lower bound per example: nll + kl_weight * kl(model) / num_data.

    Args:
        nll: mean negative log-likelihood per example of a batch, a scalar in nats.
        model: holds flipout layers.
        num_data: number of examples of the training set (not of the batch, nor of batches): the
            divergence belongs to all of them together.
        kl_weight: 1 is the posterior of Bayes; less is a cold posterior or an annealing.

    Raises:
        ValueError: for `num_data` that is not a positive number, or no weight with a prior.
    """
    check_num_data(num_data)
    if nll.dim() > 0:
        raise ValueError(
            "nll must be the mean negative log-likelihood per example, a scalar, got shape "
            f"{tuple(nll.shape)}. Use reduction='mean', or nll.mean()."
        )
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must be a number from 0, got {kl_weight}.")
    return nll + kl(model) * (kl_weight / num_data)


def add_kl_gradient(model: nn.Module, weight: float) -> Tensor:
    """Add `weight` times the gradient of `kl(model)` to `.grad` of the parameters.

    Without a graph, and in one pass over the weights.

    Args:
        model: holds flipout layers.
        weight: usually kl_weight / num_data.

    Returns:
        `kl(model)`.

    Raises:
        ValueError: if no weight has a prior.
    """
    total: Tensor | None = None
    for perturbation, part in _weights_with_prior(model):
        term = perturbation.add_kl_gradient(part.mean, part.spread, weight)
        if term is not None:
            total = term if total is None else total + term.to(total.device)
    assert total is not None
    return total


def weights_with_prior(layers: Iterable[PerturbedLayer]) -> list[WeightWithPrior]:
    """The perturbed weights of some layers that have a prior, each once; there may be none.

    Raises:
        ValueError: for a weight that two layers share, but not its spread.
    """
    seen: dict[int, list[Tensor]] = {}
    found = []
    for layer in layers:
        for weight in layer.perturbed_weights():
            known = seen.setdefault(id(weight.mean), weight.spread)
            if known is weight.spread:
                if layer.perturbation.has_prior:
                    found.append((layer.perturbation, weight))
            elif [id(part) for part in known] != [id(part) for part in weight.spread]:
                raise ValueError(
                    f"{weight.name} of a {type(layer).__name__} is tied to a weight that has "
                    "another spread, so it is not clear which of them is meant. Tie the "
                    f"parameters {', '.join(layer.perturbation.spread_names)} too, or tie the "
                    "plain layers and convert them."
                )
    return found


@torch.no_grad()
def signal_to_noise(layers: Sequence[PerturbedLayer]) -> Tensor | None:
    """The median of |mean| / std over weights (Blundell et al., 2015).

    None if no std is independent of the mean. Of many weights it is taken over an evenly spaced
    part.
    """
    weights = {
        id(weight.mean): (layer.perturbation, weight)
        for layer in layers
        if not layer.perturbation.depends_on_mean
        for weight in layer.perturbed_weights()
    }
    if not weights:
        return None
    step = max(1, sum(weight.mean.numel() for _, weight in weights.values()) // _WEIGHTS_SAMPLED)
    ratios = []
    for perturbation, weight in weights.values():
        mean, *spread = (part.flatten()[::step] for part in (weight.mean, *weight.spread))
        ratios.append((mean.abs() / perturbation.scale(mean, *spread)).float().cpu())
    return torch.cat(ratios).median()


def check_num_data(num_data: object) -> None:
    """Raise a ValueError unless `num_data` can be the size of a training set."""
    number = isinstance(num_data, Real) and not isinstance(num_data, bool)
    if not number or not 1 <= num_data < math.inf:  # type: ignore[operator]
        raise ValueError(
            f"num_data must be the number of examples in the training set, got {num_data!r}. The "
            "divergence belongs to all of them: pass for example num_data=len(train_dataset)."
        )


def _weights_with_prior(model: nn.Module) -> list[WeightWithPrior]:
    """Those of a model; raises a ValueError if there are none."""
    layers = flipout_layers(model)
    found = weights_with_prior(layers)
    if not found:
        kinds = sorted({type(layer.perturbation).__name__ for layer in layers})
        raise ValueError(
            f"no weight of {type(model).__name__} has a prior: it is perturbed by "
            f"{', '.join(kinds)}, which is noise without one. Leave the divergence out, or use "
            "Gaussian(prior_std=...)."
        )
    return found
