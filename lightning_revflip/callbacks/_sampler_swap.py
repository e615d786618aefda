"""A sampler from the optimizer of a module, with its parameter groups and learning rates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Optimizer

from lightning_revflip.sgld import PSGLD, SGHMC, SGLD, LangevinOptimizer

SAMPLERS: dict[str, type[LangevinOptimizer]] = {"sgld": SGLD, "psgld": PSGLD, "sghmc": SGHMC}

_OF_SGD = frozenset(SGD([torch.zeros(1)], lr=1.0).defaults) - {"lr"}
"""Settings of groups that a sampler does not have."""


class Target(NamedTuple):
    """Which distribution is sampled.

    Attributes:
        num_data: number of training examples.
        temperature: T.
        prior_precision: of all parameters; None: as the weight decay says.
    """

    num_data: int
    temperature: float
    prior_precision: float | None


def sampler_from(
    optimizer: Optimizer,
    kind: type[LangevinOptimizer],
    target: Target,
    generator: torch.Generator,
    **options: Any,
) -> LangevinOptimizer:
    """A sampler of what an optimizer trains, group by group.

    Weight decay is the gradient of a Gaussian prior, so it becomes a prior precision:
    `weight_decay` times `num_data`.

    Args:
        optimizer: plain SGD, or a sampler, which is kept if it agrees with the other arguments.
        kind: class of the sampler.
        target: what it samples.
        generator: of the noise.
        options: further settings of the sampler.

    Raises:
        MisconfigurationException: for another optimizer, and for two priors.
    """
    if isinstance(optimizer, LangevinOptimizer):
        _check_kind(optimizer, kind, options)
        check_agrees(optimizer, "that the module returns", target)
        return optimizer
    _check_plain(optimizer)
    num_data, temperature, prior_precision = target
    groups = []
    for group in optimizer.param_groups:
        decay = group["weight_decay"]
        if decay != 0 and prior_precision is not None:
            raise MisconfigurationException(
                f"prior_precision={prior_precision} and weight_decay={decay} are two priors over "
                "the same weights. Leave out prior_precision, which then is weight_decay * "
                f"num_data = {decay * num_data:g}, or set weight_decay=0."
            )
        kept = {name: value for name, value in group.items() if name not in _OF_SGD}
        kept["prior_precision"] = prior_precision or decay * num_data
        # A warm-up may have begun with a learning rate of 0, which no sampler is made with.
        groups.append({**kept, "lr": group.get("initial_lr", group["lr"])})
    sampler = kind(
        groups,
        optimizer.defaults["lr"],
        num_data=num_data,
        temperature=temperature,
        generator=generator,
        **options,
    )
    for new, old in zip(sampler.param_groups, optimizer.param_groups, strict=True):
        new["lr"] = old["lr"]
    return sampler


def _check_plain(optimizer: Optimizer) -> None:
    """Raise unless an optimizer does nothing but steps of gradient descent."""
    name = type(optimizer).__name__
    way_out = (
        "Return torch.optim.SGD(self.parameters(), lr) from configure_optimizers, whose learning "
        "rate and schedule are kept; sampler='psgld' adapts steps to each weight as RMSprop and "
        "Adam do, sampler='sghmc' has a momentum. Or return one of lightning_revflip.SGLD, PSGLD, "
        "SGHMC."
    )
    if type(optimizer) is not SGD:
        raise MisconfigurationException(
            f"SGLDSampler makes a sampler of plain SGD, got {name}, whose adapted steps would not "
            f"sample from the posterior. {way_out}"
        )
    for group in optimizer.param_groups:
        if group["momentum"] != 0 or group["maximize"]:
            found = f"momentum={group['momentum']}" if group["momentum"] else "maximize=True"
            raise MisconfigurationException(
                f"SGLDSampler makes a sampler of plain SGD, got SGD with {found}. (OneCycleLR and "
                f"CyclicLR set a momentum unless cycle_momentum=False.) {way_out}"
            )


def _check_kind(
    sampler: LangevinOptimizer, kind: type[LangevinOptimizer], options: dict[str, Any]
) -> None:
    """Raise if what the module returns is another sampler than one that was chosen."""
    found = type(sampler).__name__
    if options or (kind is not SGLD and not isinstance(sampler, kind)):
        raise MisconfigurationException(
            f"The module returns {found} from configure_optimizers, and SGLDSampler has settings "
            f"of a {kind.__name__} as well. Leave out sampler and sampler_options, or return "
            "torch.optim.SGD."
        )


def check_agrees(sampler: LangevinOptimizer, whose: str, target: Target) -> None:
    """Raise if a sampler has another target.

    Raises:
        MisconfigurationException: naming the first difference.
    """
    for group in sampler.param_groups:
        for name, value in target._asdict().items():
            found = group.get(f"initial_{name}", group[name])
            if value is not None and found != value:
                raise MisconfigurationException(
                    f"SGLDSampler has {name}={value}, and the {type(sampler).__name__} {whose} has "
                    f"{name}={found}. A chain samples one distribution: give both the same."
                )
