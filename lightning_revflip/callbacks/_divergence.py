"""The gradient of the divergence, as a Trainer's optimizers need it."""

from collections.abc import Collection, Iterable

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_revflip.flipout import Perturbation, PerturbedLayer
from lightning_revflip.flipout.elbo import WeightWithPrior
from lightning_revflip.flipout.layer import PerturbedWeight


def divergence(weights: Iterable[WeightWithPrior]) -> Tensor:
    """The divergence of these weights from their priors, in nats, without a graph."""
    total = torch.zeros(())
    with torch.no_grad():
        for perturbation, weight in weights:
            term = perturbation.kl(weight.mean, *weight.spread)
            if term is not None:
                total = total + term.cpu()
    return total


def add_gradient(
    weights: Iterable[WeightWithPrior], parameters: Collection[nn.Parameter], factor: float
) -> None:
    """Add `factor` times the gradient of the divergence to `.grad` of these parameters alone."""
    for perturbation, weight in weights:
        learned = [part for part in (weight.mean, *weight.spread) if part.requires_grad]
        own = [part for part in learned if part in parameters]
        if len(own) == len(learned):
            perturbation.add_kl_gradient(weight.mean, weight.spread, factor)
        elif own:
            _add_partly(perturbation, weight, own, factor)


def _add_partly(
    perturbation: Perturbation, weight: PerturbedWeight, own: list[Tensor], factor: float
) -> None:
    """As `add_gradient`, where another optimizer has some of the parameters of a weight."""
    with torch.enable_grad():
        term = perturbation.kl(weight.mean, *weight.spread)
    assert term is not None
    for part, grad in zip(own, torch.autograd.grad(term, own), strict=True):
        if part.grad is None:
            part.grad = torch.zeros_like(part)
        part.grad.add_(grad, alpha=factor)


def warn_of_weight_decay(trainer: Trainer, layers: Iterable[PerturbedLayer]) -> None:
    """Warn if weight decay acts on spreads, where 0 is no small value: softplus(0) = 0.69."""
    spreads = {id(part) for each in layers for w in each.perturbed_weights() for part in w.spread}
    decayed = any(
        group.get("weight_decay") and any(id(part) in spreads for part in group["params"])
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
    )
    if decayed:
        rank_zero_warn(
            "Weight decay acts on parameters of perturbations and pulls them to 0; a rho of 0 is a "
            "standard deviation of 0.69. Put them into a parameter group with weight_decay=0. "
            "(With Gaussian(prior_std=...), the prior is what decays the weights.)"
        )


def _parts(perturbation: Perturbation, weight: PerturbedWeight) -> list[tuple[str, Tensor]]:
    """The parameters of a weight by name."""
    spread = zip(perturbation.spread_names, weight.spread, strict=True)
    return [
        (weight.name, weight.mean),
        *((f"{weight.name}_{suffix}", part) for suffix, part in spread),
    ]


def parameters_of(optimizer: Optimizer) -> set[nn.Parameter]:
    """The parameters that an optimizer changes."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


# --- settings under which the gradient would not be exact --------------------------------------


def check_strategy(trainer: Trainer) -> None:
    """Raise if parameters and gradients of the Trainer's strategy are cut into shards."""
    if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"Flipout needs whole weights and gradients, and {type(trainer.strategy).__name__} "
            "shards them. Use a single device or strategy='ddp'."
        )


def check_optimizers(trainer: Trainer, weights: Collection[WeightWithPrior]) -> None:
    """Raise if an optimizer of these weights could not take the gradient of the divergence.

    Warns:
        UserWarning: if no optimizer has one of their parameters.
    """
    optimized = {id(p) for optimizer in trainer.optimizers for p in parameters_of(optimizer)}
    left_out = {
        name
        for perturbation, weight in weights
        for name, part in _parts(perturbation, weight)
        if part.requires_grad and id(part) not in optimized
    }
    if left_out:
        rank_zero_warn(
            f"No optimizer has the {', '.join(sorted(left_out))} of some layers, which stay as "
            "they are. Give optimizers model.parameters(), or freeze what is to stay."
        )
    parts = {id(part) for _, weight in weights for part in (weight.mean, *weight.spread)}
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    for optimizer in trainer.optimizers:
        if not parts.intersection(map(id, parameters_of(optimizer))):
            continue
        name = type(optimizer).__name__
        if scaler is not None and _optimizer_handles_unscaling(optimizer):
            raise MisconfigurationException(
                f"A fused {name} with precision='16-mixed' unscales gradients within its step, so "
                "the gradient of the divergence would be added to scaled ones. Use fused=False, "
                "or precision='bf16-mixed'."
            )
        line_search = isinstance(optimizer, LBFGS) and any(
            group["line_search_fn"] is not None for group in optimizer.param_groups
        )
        if line_search:
            raise MisconfigurationException(
                f"The line search of {name} compares losses, which do not hold the divergence that "
                "its gradients hold. Use line_search_fn=None, or add "
                "lightning_revflip.kl(model) / num_data to the loss and set kl_weight=0."
            )
