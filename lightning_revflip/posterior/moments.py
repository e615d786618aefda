"""Mean, variance and principal components of rows that are read in chunks.

K rows of P values are never in memory together: what is kept is of size P, K x K or rank x P.
Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from lightning_revflip.posterior.layout import Layout

_CHUNK_BYTES = 2**28
"""A chunk in float64. Principal components have two in memory."""


class Rows(Protocol):
    """Samples as rows of float32, such as a `SampleBank`."""

    layout: Layout

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, shape (up to `size`, P) at a time; the same at each call."""


@dataclass(frozen=True)
class Moments:
    """Number of rows, and mean and unbiased variance of each column in float64, shape (P,)."""

    count: int
    mean: Tensor
    variance: Tensor


def moments(rows: Rows) -> Moments:
    """Mean and variance of all rows, in one pass (Chan et al., 1979).

    Raises:
        ValueError: for fewer than two rows, and values that are not finite.
    """
    count = 0
    mean = torch.zeros(rows.layout.numel, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for chunk in wide_chunks(rows):
        total = count + len(chunk)
        chunk_mean = chunk.mean(0)
        shift = chunk_mean - mean
        squares += chunk.sub_(chunk_mean).square_().sum(0)
        squares += shift.square() * (count * len(chunk) / total)
        mean += shift * (len(chunk) / total)
        count = total
    if count < 2:
        raise ValueError(
            f"a Gaussian is fitted to at least 2 samples, got {count}. Collect more of them."
        )
    check_finite(squares.unsqueeze(0), rows.layout)
    return Moments(count, mean, squares / (count - 1))


def principal_components(rows: Rows, found: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """The directions in which rows vary most, from the K x K products of centred rows.

    Args:
        rows: the samples.
        found: their moments.
        rank: number of components, from 1 to K - 1.

    Returns:
        Orthonormal components, shape (rank, P), float32, and the standard deviation along each,
        shape (rank,), float64, falling. Where rows vary in fewer directions, both are 0.
    """
    eigenvalues, vectors = torch.linalg.eigh(_products(rows, found))
    eigenvalues, vectors = eigenvalues.flip(0)[:rank], vectors.flip(1)[:, :rank]
    noise = eigenvalues[0] * found.count * torch.finfo(torch.float64).eps
    scale = torch.where(eigenvalues > noise, eigenvalues, torch.inf).rsqrt()
    components = torch.zeros(rank, rows.layout.numel)
    done = 0
    for chunk in wide_chunks(rows):
        weights = vectors[done : done + len(chunk)] * scale
        components += (weights.T @ chunk.sub_(found.mean)).float()
        done += len(chunk)
    std = torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt() / (found.count - 1) ** 0.5
    return components, std


def last_deviations(rows: Rows, count: int, rank: int) -> Tensor:
    """Deviations of the last `rank` of `count` rows from the mean of the rows up to each.

    Returns:
        Shape (rank, P), float32.
    """
    deviations = torch.empty(rank, rows.layout.numel)
    mean = torch.zeros(rows.layout.numel, dtype=torch.float64)
    seen = 0
    for chunk in wide_chunks(rows):
        before = chunk[: max(0, count - rank - seen)]
        if len(before) > 0:
            seen += len(before)
            mean += (before.mean(0) - mean) * (len(before) / seen)
        for row in chunk[len(before) :]:
            seen += 1
            mean += (row - mean) / seen
            deviations[seen - 1 - (count - rank)] = row - mean
    return deviations


def wide_chunks(rows: Rows) -> Iterator[Tensor]:
    """All rows in float64, as many at a time as `_CHUNK_BYTES` hold; the reader may change them."""
    size = max(1, _CHUNK_BYTES // (8 * max(1, rows.layout.numel)))
    for chunk in rows.chunks(size):
        yield chunk.to(torch.float64, copy=True)


def _products(rows: Rows, found: Moments) -> Tensor:
    """Inner products of centred rows, shape (K, K)."""
    products = torch.zeros(found.count, found.count, dtype=torch.float64)
    end = 0
    for index, chunk in enumerate(wide_chunks(rows)):
        start, end = end, end + len(chunk)
        chunk.sub_(found.mean)
        place = 0
        for earlier in islice(wide_chunks(rows), index):
            block = chunk @ earlier.sub_(found.mean).T
            products[start:end, place : place + len(earlier)] = block
            place += len(earlier)
        products[start:end, start:end] = chunk @ chunk.T
    return products  # eigh reads the lower triangle


def check_finite(rows: Tensor, layout: Layout) -> None:
    """Raise if samples have NaN or infinite values.

    Args:
        rows: samples, or what is not finite where one of them is not, shape (n, P).
        layout: names of the parameters.

    Raises:
        ValueError: naming the first parameter that has such values, or for another number of
            columns.
    """
    for name, part in layout.unflatten(rows).items():
        if not part.isfinite().all():
            raise ValueError(
                f"samples of {name} have values that are not finite. Leave out the samples from "
                "where training diverged."
            )
