"""How far two sets of samples are from each other."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(
    a: Tensor, b: Tensor, num_projections: int = 128, generator: torch.Generator | None = None
) -> Tensor:
    """The Wasserstein-1 distance along a random direction, averaged over directions.

    E_u W_1(<u, a>, <u, b>),   u uniform on the unit sphere            (Bonneel et al., 2015)

    The distance of two sets of the same distribution is above 0: compare with that of two halves
    of one set.

    Args:
        a: shape (n, size).
        b: shape (m, size).
        num_projections: number of directions.
        generator: a CPU generator, draws the directions; None: torch's global one.

    Returns:
        A scalar, in the units of the samples, float64.

    Raises:
        ValueError: for other shapes, and empty sets.
    """
    _check_sets(a, b, least=1)
    directions = torch.randn(a.shape[1], num_projections, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=0).to(a.device)
    projections = [(samples.float() @ directions).T.double() for samples in (a, b)]
    return _wasserstein(*projections).mean()


def moment_errors(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """How far mean and covariance of samples are from those of a reference.

    Nothing of the size of a covariance of all weights is computed, so that the samples may be rows
    of weights, too.

    Args:
        samples: shape (n, size).
        reference: shape (m, size).

    Returns:
        The distance of the means over the root of the reference's total variance, and the
        Frobenius norm of the difference of the covariances over that of the reference's; scalars,
        float64.

    Raises:
        ValueError: for other shapes, sets of fewer than two, and a reference without variance.
    """
    _check_sets(samples, reference, least=2)
    a, b = samples.double(), reference.double()
    shift = a.mean(0) - b.mean(0)
    # Scaled so that a covariance is deviations^T deviations.
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    spread = b.square().sum()
    if spread == 0:
        raise ValueError("the samples of the reference are all the same, so errors have no scale.")
    difference = _inner(a, a) + _inner(b, b) - 2 * _inner(a, b)
    covariance_error = (difference.clamp_min(0) / _inner(b, b)).sqrt()
    return shift.norm() / spread.sqrt(), covariance_error


def mode_shares(samples: Tensor, centres: Tensor, radius: float) -> Tensor:
    """Which share of samples is at each mode.

    Args:
        samples: shape (n, size).
        centres: of the modes, shape (modes, size).
        radius: a sample belongs to the nearest mode, if that is not farther than this.

    Returns:
        Shape (modes,), float64; what it lacks to a sum of 1 is far from all modes.

    Raises:
        ValueError: for other shapes, and empty sets.
    """
    _check_sets(samples, centres, least=1)
    distances = torch.cdist(samples.double(), centres.double())
    nearest = distances.min(dim=1)
    counts = nearest.indices[nearest.values <= radius].bincount(minlength=len(centres))
    return counts.double() / len(samples)


def modes_covered(samples: Tensor, centres: Tensor, radius: float) -> int:
    """At how many modes there is at least one sample; arguments as for `mode_shares`."""
    return int((mode_shares(samples, centres, radius) > 0).sum())


def _wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """Wasserstein-1 distances of samples of one dimension, (k, n) and (k, m), in each of k rows.

    The integral over levels from 0 to 1 of the distance of the two quantile functions, which are
    constant between neighbouring levels i / n and j / m.
    """
    n, m = a.shape[1], b.shape[1]
    # Exact, as whole numbers of 1 / (n m).
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values
    widths = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    lower = ends - widths
    at_a, at_b = ((lower // other).clamp(max=last) for other, last in ((m, n - 1), (n, m - 1)))
    gaps = (a.sort(1).values[:, at_a] - b.sort(1).values[:, at_b]).abs()
    return gaps @ (widths.double() / (n * m)).to(gaps.device)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of a^T a and b^T b, by the smaller of the matrices that it can be had from."""
    if a.shape[1] ** 2 <= len(a) * len(b):
        return ((a.T @ a) * (b.T @ b)).sum()
    return (a @ b.T).square().sum()


def _check_sets(a: Tensor, b: Tensor, least: int) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(
            f"two sets of at least {least} samples must have shapes (n, size) and (m, size), got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
