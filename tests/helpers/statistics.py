"""Statistics by which random numbers are held against a law."""

import math

import torch
from torch import Tensor


def two_sample_distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov-Smirnov: the largest distance of two empirical distribution functions."""
    grid = torch.cat([a, b]).sort().values
    below = [
        torch.searchsorted(part.sort().values, grid, right=True) / len(part) for part in (a, b)
    ]
    return float((below[0] - below[1]).abs().max())


def normal_distance(z: Tensor) -> float:
    """Kolmogorov-Smirnov distance from the standard normal distribution."""
    law = torch.special.ndtr(z.double().sort().values)
    steps = torch.arange(len(z) + 1, dtype=torch.float64) / len(z)
    return float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())


def largest_distance(*sizes: int, chance: float = 1e-6) -> float:
    """The distance that samples of these sizes from one law exceed with this probability."""
    return math.sqrt(-0.5 * math.log(chance / 2) * sum(1 / size for size in sizes))


def largest_correlation(columns: Tensor) -> float:
    """Among all pairs of columns, in standard errors of independent ones."""
    correlation = torch.corrcoef(columns.T).fill_diagonal_(0)
    return float(correlation.abs().max()) * math.sqrt(len(columns))
