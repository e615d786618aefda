"""Estimators of how well chains mix, over many quantities at once; `diagnostics.py` calls them.

All take draws of shape (quantities, chains, draws), finite, float64 and on the CPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def split(chains: Tensor) -> Tensor:
    """First and last halves of all chains as chains of their own."""
    half = chains.shape[-1] // 2
    return torch.cat([chains[..., :half], chains[..., -half:]], dim=1)


def normal_scores(chains: Tensor) -> Tensor:
    """Normal quantiles of the ranks among all draws of a quantity (Blom, 1958); ties share one."""
    ordered, order = chains.flatten(1).sort(dim=1)
    size = ordered.shape[1]
    place = torch.arange(1, size + 1)
    differs = ordered[:, 1:] != ordered[:, :-1]
    first = place.where(F.pad(differs, (1, 0), value=True), 0).cummax(1).values
    last = place.where(F.pad(differs, (0, 1), value=True), size + 1)
    last = last.flip(1).cummin(1).values.flip(1)
    scores = torch.special.ndtri(((first + last).double() / 2 - 3 / 8) / (size + 1 / 4))
    return torch.empty_like(ordered).scatter_(1, order, scores).view_as(chains)


def median(chains: Tensor) -> Tensor:
    """Of all draws of a quantity, shape (quantities, 1, 1); the mean of the two in the middle."""
    ordered = chains.flatten(1).sort(dim=1).values
    size = ordered.shape[1]
    return ((ordered[:, (size - 1) // 2] + ordered[:, size // 2]) / 2).view(-1, 1, 1)


def rhat(chains: Tensor) -> Tensor:
    """Square root of the variance of all draws over that within chains."""
    size = chains.shape[-1]
    between = size * chains.mean(-1).var(-1)
    within = chains.var(-1).mean(-1)
    return ((between / within + size - 1) / size).sqrt()


def autocovariance(chains: Tensor) -> Tensor:
    """Of each chain at lags 0, 1, ..., by the fast Fourier transform."""
    size = chains.shape[-1]
    centred = chains - chains.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * size)  # padded: no lag wraps around
    covariance: Tensor = torch.fft.irfft(spectrum.abs().square(), n=2 * size)[..., :size] / size
    return covariance


def effective_size(chains: Tensor) -> Tensor:
    """Effective sample size by Geyer's initial monotone sequence (Geyer, 1992; Vehtari, eq. 10).

    Autocorrelations come in pairs of an even lag and the next odd one, whose sums are positive and
    fall for a reversible chain. They are counted up to the first sum that is not positive, and none
    counts more than the one before.
    """
    _, num_chains, size = chains.shape
    covariance = autocovariance(chains).mean(1)
    within = covariance[:, 0] * size / (size - 1)
    total = covariance[:, 0] + chains.mean(-1).var(-1)
    correlation = 1 - (within.unsqueeze(1) - covariance) / total.unsqueeze(1)
    correlation[:, 0] = 1

    last = max(0, (size - 3) // 2)  # the last pair that may be looked at
    even, odd = correlation[:, : 2 * last + 2].view(-1, last + 1, 2).unbind(-1)
    pairs = even + odd
    positive = (pairs > 0).cumprod(1)
    end = positive.sum(1).clamp(max=last)  # the first pair that is not counted in full
    counted = torch.arange(last + 1) < end.unsqueeze(1)
    falling = pairs.cummin(1).values
    # Of the pair at the end, the even lag counts if it is positive.
    rest = even.gather(1, end.unsqueeze(1)).squeeze(1)
    rest_counts = (rest > 0) | positive.gather(1, end.unsqueeze(1)).squeeze(1).bool()

    time = -1 + 2 * (falling * counted).sum(1) + rest * rest_counts
    draws = num_chains * size
    # Draws that repel each other may count more than once, up to this limit.
    effective: Tensor = draws / time.clamp(min=1 / math.log10(draws))
    return effective
