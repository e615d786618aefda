"""Has a chain mixed? Effective sample size, split R-hat and autocorrelation of what it drew.

Draws have shape (chains, draws) or (chains, draws, quantities), where a quantity is any number that
follows from one sample: a weight, a projection of all weights (`probe_weights`), the probability of
a class for some input. The estimators are those of Vehtari, Gelman, Simpson, Carpenter and Bürkner,
"Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of
MCMC", Bayesian Analysis 2021, arXiv 1903.08008.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_revflip.sgld.estimators import (
    autocovariance,
    effective_size,
    median,
    normal_scores,
    rhat,
    split,
)

Backend = Literal["arviz", "torch"]

FEWEST_DRAWS = 4
ENOUGH_ESS = 100
"""Effective samples below which `Diagnostics` warns."""
ENOUGH_ESS_SHARE = 0.1
"""Share of effective samples among the draws below which `Diagnostics` warns."""
LARGEST_RHAT = 1.01
"""R-hat above which `Diagnostics` warns."""


# --- what a user calls -----------------------------------------------------------------------


def effective_sample_size(
    draws: Tensor, method: Literal["bulk", "mean"] = "bulk", backend: Backend | None = None
) -> Tensor:
    """Number of independent draws that would tell as much about a quantity as these draws do.

    Chains are split in halves, so that a drift within a chain counts as bad mixing, and their
    autocorrelation is summed up to where Geyer's initial monotone sequence ends.

    Args:
        draws: shape (chains, draws) or (chains, draws, quantities), at least 4 draws. Of an odd
            number of draws the middle one is left out.
        method: `bulk` takes the normal scores of the ranks, which exist for every distribution;
            `mean` takes the draws themselves: the variance of the draws over this number is the
            squared standard error of their mean.
        backend: `arviz` uses the package arviz_stats, `torch` our own functions, which take half
            the time for many quantities. None: arviz where it is installed. Both give the same
            numbers.

    Returns:
        float64 on the device of `draws`, shape () or (quantities,). NaN for a quantity that is
        constant, which tells nothing about mixing. Negative autocorrelation can make it larger
        than the number of draws.

    Raises:
        ValueError: for another shape, fewer than 4 draws, draws that are not finite, an unknown
            method or backend.
        ImportError: for `arviz` where it is not installed.
    """
    if method not in ("bulk", "mean"):
        raise ValueError(f"method must be 'bulk' or 'mean', got {method!r}.")
    chains = _checked(draws)
    if _uses_arviz(backend):
        found = _arviz().ess(chains.numpy(), method=method)
        ess = torch.as_tensor(found, dtype=torch.float64)
    else:
        halves = split(chains)
        ess = effective_size(normal_scores(halves) if method == "bulk" else halves)
    return _shaped_as(ess.masked_fill(_constant(chains), math.nan), draws)


def split_rhat(draws: Tensor, backend: Backend | None = None) -> Tensor:
    """Rank-normalized split R-hat: how much wider all chains are together than each for itself.

    Close to 1 if all halves of all chains have seen the same distribution. It is the larger one of
    two: on the normal scores of the draws, which finds chains at different places, and on those of
    their distances from the median, which finds chains of different width.

    Args:
        draws: shape (chains, draws) or (chains, draws, quantities), at least 4 draws. Of an odd
            number of draws the middle one is left out. Of one chain the two halves are compared.
        backend: as in `effective_sample_size`. arviz has no value for one chain, for which
            our own is taken.

    Returns:
        float64 on the device of `draws`, shape () or (quantities,). NaN for a quantity that is
        constant, infinite if each chain stands still at a place of its own.

    Raises:
        ValueError: for another shape, fewer than 4 draws, draws that are not finite, an unknown
            backend.
        ImportError: for `arviz` where it is not installed.
    """
    chains = _checked(draws)
    if _uses_arviz(backend) and chains.shape[1] > 1:
        import numpy

        with numpy.errstate(divide="ignore", invalid="ignore"):  # of chains that stand still
            found = torch.as_tensor(_arviz().rhat(chains.numpy()), dtype=torch.float64)
    else:
        halves = split(chains)
        distances = (halves - median(halves)).abs()
        found = torch.fmax(rhat(normal_scores(halves)), rhat(normal_scores(distances)))
    stands_still = (chains == chains[..., :1]).all(-1).all(-1)
    found = found.masked_fill(stands_still, math.inf).masked_fill(_constant(chains), math.nan)
    return _shaped_as(found, draws)


def autocorrelation(draws: Tensor, max_lag: int | None = None) -> Tensor:
    """Autocorrelation of each chain around its own mean.

    Args:
        draws: shape (chains, draws) or (chains, draws, quantities), at least 4 draws.
        max_lag: the largest lag; None: all lags, up to draws - 1.

    Returns:
        float64 on the device of `draws`, shape (chains, max_lag + 1) or (chains, max_lag + 1,
        quantities); 1 at lag 0, NaN for a chain that is constant.

    Raises:
        ValueError: for another shape, fewer than 4 draws, draws that are not finite, a lag that the
            draws do not have.
    """
    chains = _checked(draws)
    length = chains.shape[-1]
    max_lag = length - 1 if max_lag is None else max_lag
    if not 0 <= max_lag < length:
        raise ValueError(
            f"max_lag must be from 0 to {length - 1}, one less than the number of draws, got "
            f"{max_lag}."
        )
    covariance = autocovariance(chains)
    stands_still = (chains == chains[..., :1]).all(-1, keepdim=True)
    correlation = (covariance / covariance[..., :1]).masked_fill(stands_still, math.nan)
    correlation = correlation[..., : max_lag + 1].permute(1, 2, 0).to(draws.device)
    return correlation if draws.ndim == 3 else correlation.squeeze(-1)


def probe_weights(
    rows: Tensor, num_coordinates: int = 16, num_projections: int = 16, seed: int = 0
) -> Tensor:
    """A few numbers of each sample of all weights, to diagnose a chain in weight space cheaply.

    Some single weights, and projections of all weights on random directions of length 1. Both
    follow from `seed` and the number of weights alone, so that samples may come in several calls.

    Args:
        rows: samples of all weights, one a row, shape (samples, weights), floating point.
        num_coordinates: how many single weights, all of them if there are fewer.
        num_projections: how many projections.
        seed: chooses weights and directions.

    Returns:
        float64 on the device of `rows`, shape (samples, quantities): first the weights in their
        order, then the projections.

    Raises:
        ValueError: for another shape or negative numbers.

    Examples:
        >>> chains = torch.randn(4, 250, 1000)  # of 1,000 weights
        >>> draws = torch.stack([probe_weights(rows) for rows in chains])
        >>> draws.shape
        torch.Size([4, 250, 32])
    """
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(
            "Expected rows of shape (samples, weights) with at least one weight, got shape "
            f"{tuple(rows.shape)}."
        )
    if min(num_coordinates, num_projections) < 0:
        raise ValueError(
            "num_coordinates and num_projections must be at least 0, got "
            f"{num_coordinates} and {num_projections}."
        )
    weights = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(weights, generator=generator)[:num_coordinates].sort().values
    columns = [rows[:, chosen.to(rows.device)].double()]
    for _ in range(num_projections):  # one by one: all directions at once could fill the memory
        direction = torch.randn(weights, generator=generator)
        direction /= direction.norm()
        columns.append((rows.float() @ direction.to(rows.device)).double().unsqueeze(1))
    return torch.cat(columns, dim=1)


@dataclass(frozen=True)
class Diagnostics:
    """What `diagnose` found; `str` of it is a text for people.

    Attributes:
        num_chains: number of chains.
        num_draws: draws of each chain.
        num_quantities: quantities that ESS and R-hat are taken over.
        num_constant: quantities beside these that are the same in all draws.
        ess_min: smallest effective sample size of all quantities, out of num_chains * num_draws.
        ess_median: median of the effective sample sizes.
        rhat_max: largest split R-hat.
        rhat_median: median of the split R-hats.
    """

    num_chains: int
    num_draws: int
    num_quantities: int
    num_constant: int
    ess_min: float
    ess_median: float
    rhat_max: float
    rhat_median: float

    def warnings(self) -> list[str]:
        """What speaks against trusting these draws, in plain words; empty if nothing does."""
        if self.num_quantities == 0:
            return ["No quantity changed from draw to draw, so nothing can be said of mixing."]
        found = []
        total = self.num_chains * self.num_draws
        if self.ess_min < max(ENOUGH_ESS, ENOUGH_ESS_SHARE * total):
            found.append(
                f"The {total:,} draws tell as much as {self.ess_min:,.0f} independent ones "
                f"(wanted: {ENOUGH_ESS}, and {ENOUGH_ESS_SHARE:.0%} of the draws). Run longer or "
                "more chains, or keep fewer draws, further apart; more draws of the same time "
                "span tell little."
            )
        if self.rhat_max > LARGEST_RHAT:
            parts = "chains" if self.num_chains > 1 else "halves of the chain"
            found.append(
                f"The {parts} have not seen the same distribution: R-hat is {self.rhat_max:.2f} "
                f"(wanted: at most {LARGEST_RHAT}). Use a longer burn-in, a larger step size or "
                "longer chains."
            )
        if self.num_chains == 1:
            found.append(
                "One chain cannot tell whether it missed a part of the posterior. Run several from "
                "different initial weights."
            )
        return found

    def __str__(self) -> str:
        summary = (
            f"Chains: {self.num_chains}, draws of each: {self.num_draws:,}, quantities: "
            f"{self.num_quantities:,}; ESS {self.ess_min:,.0f} at least, {self.ess_median:,.0f} in "
            f"the median; R-hat {self.rhat_max:.2f} at most, {self.rhat_median:.2f} in the median."
        )
        return "\n".join([summary, *self.warnings()])


def diagnose(draws: Tensor, backend: Backend | None = None) -> Diagnostics:
    """Effective sample size and split R-hat over all quantities, in one verdict.

    Args:
        draws: shape (chains, draws) or (chains, draws, quantities), at least 4 draws.
        backend: as in `effective_sample_size`.

    Returns:
        The diagnostics. Quantities that are constant are counted and left out of the others; if all
        are, ESS and R-hat are NaN.

    Raises:
        ValueError: for another shape, fewer than 4 draws, draws that are not finite, an unknown
            backend.
        ImportError: for `arviz` where it is not installed.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = diagnose(torch.randn(4, 500, 10, generator=generator))
        >>> found.warnings()
        []
        >>> print(diagnose(torch.linspace(0, 1, 500).unsqueeze(0)))
        Chains: 1, draws of each: 500, quantities: 1; ESS 1 at least, 1 in the median; R-hat 2...
    """
    ess = effective_sample_size(draws, backend=backend).flatten()
    rhats = split_rhat(draws, backend=backend).flatten()
    moves = ~ess.isnan()
    ess, rhats = ess[moves], rhats[moves]
    some = len(ess) > 0
    return Diagnostics(
        num_chains=draws.shape[0],
        num_draws=draws.shape[1],
        num_quantities=len(ess),
        num_constant=len(moves) - len(ess),
        ess_min=float(ess.min()) if some else math.nan,
        ess_median=statistics.median(ess.tolist()) if some else math.nan,
        rhat_max=float(rhats.max()) if some else math.nan,
        rhat_median=statistics.median(rhats.tolist()) if some else math.nan,
    )


# --- shapes and checks -----------------------------------------------------------------------


def _checked(draws: Tensor) -> Tensor:
    """The draws as float64 on the CPU, shape (quantities, chains, draws)."""
    if draws.ndim not in (2, 3) or draws.numel() == 0:
        raise ValueError(
            "Expected draws of shape (chains, draws) or (chains, draws, quantities), none of them "
            f"0, got shape {tuple(draws.shape)}."
        )
    if draws.shape[1] < FEWEST_DRAWS:
        raise ValueError(
            f"At least {FEWEST_DRAWS} draws of each chain are needed, got {draws.shape[1]}."
        )
    chains = draws.detach().cpu().double()
    chains = chains.unsqueeze(0) if draws.ndim == 2 else chains.permute(2, 0, 1)
    if not chains.isfinite().all():
        wrong = (~chains.isfinite()).any(-1).any(-1)
        raise ValueError(
            f"{int(wrong.sum())} of {len(chains)} quantities have draws that are infinite or NaN, "
            f"the first is number {int(wrong.int().argmax())}. A chain with such weights has "
            "diverged: lower the step size."
        )
    return chains.contiguous()


def _uses_arviz(backend: Backend | None) -> bool:
    if backend not in (None, "arviz", "torch"):
        raise ValueError(f"backend must be 'arviz', 'torch' or None, got {backend!r}.")
    if backend == "torch":
        return False
    installed = find_spec("arviz_stats") is not None
    if backend == "arviz" and not installed:
        raise ImportError(
            "backend='arviz' needs the package arviz-stats: `pip install arviz-stats`, or use "
            "backend='torch', which gives the same numbers."
        )
    return installed


def _arviz() -> Any:
    """The array interface of arviz_stats, whose functions have no types."""
    return import_module("arviz_stats.base").array_stats


def _constant(chains: Tensor) -> Tensor:
    """Which quantities are the same in all draws, shape (quantities,)."""
    return chains.amax((1, 2)) == chains.amin((1, 2))


def _shaped_as(values: Tensor, draws: Tensor) -> Tensor:
    """One value for each quantity, without a dimension where the draws have none."""
    return (values if draws.ndim == 3 else values.squeeze(0)).to(draws.device)
