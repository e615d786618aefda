"""What the fitness of members counts: its rank, its deviation from the mean, or itself."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Shaping = Literal["rank", "standardized", "none"]

SHAPINGS = get_args(Shaping)


def shape_fitness(fitness: Tensor, shaping: Shaping = "rank") -> Tensor:
    """Weights of the members in the estimate of the gradient.

    - `rank`: (rank - 1) / (N - 1) - 1/2, from -1/2 for the worst to 1/2 for the best; equal
      members share the mean of their ranks. Any increasing function of the fitness gives the same.
    - `standardized`: (fitness - mean) / standard deviation; 0 if all are equal.
    - `none`: the fitness.

    Args:
        fitness: of N members, floating point, shape (N,); more is better.
        shaping: see above.

    Returns:
        Shape and dtype of `fitness`.

    Raises:
        ValueError: for another shape, an unknown shaping, or fitness that is not finite, naming the
            members.

    Examples:
        >>> shape_fitness(torch.tensor([3.0, 100.0, 3.0]))
        tensor([-0.2500,  0.5000, -0.2500])
    """
    if shaping not in SHAPINGS:
        raise ValueError(f"shaping must be one of {SHAPINGS}, got {shaping!r}.")
    if fitness.dim() != 1 or not fitness.is_floating_point():
        raise ValueError(
            "fitness must be one floating point number for each member, got shape "
            f"{tuple(fitness.shape)} of {fitness.dtype}."
        )
    check_finite(fitness)
    if shaping == "none":
        return fitness
    if shaping == "rank":
        return _ranks(fitness)
    deviation = fitness - fitness.mean()
    scale = deviation.square().mean().sqrt()
    # Equal members may deviate by a rounding error, which must not be blown up.
    equal = fitness.max() == fitness.min()
    return torch.where(equal, torch.zeros_like(deviation), deviation / scale)


def check_finite(fitness: Tensor) -> None:
    """Raise a ValueError that names the members whose fitness is NaN or infinite."""
    wrong = (~fitness.isfinite()).nonzero().flatten().tolist()
    if wrong:
        named = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(
            f"the fitness of {len(wrong)} of {len(fitness)} members is not finite: {named}. Give "
            "members that failed a finite fitness that is worse than all others, or use a smaller "
            "sigma."
        )


def _ranks(fitness: Tensor) -> Tensor:
    """Ranks from -1/2 to 1/2, of equal members the mean of theirs."""
    if len(fitness) == 1:
        return torch.zeros_like(fitness)
    _, places, counts = torch.unique(fitness, return_inverse=True, return_counts=True)
    mean_ranks: Tensor = counts.cumsum(0) - (counts + 1).to(fitness.dtype) / 2
    return mean_ranks[places] / (len(fitness) - 1) - 0.5
