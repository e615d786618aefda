"""Posteriors with several modes: does a generator find them, and what does a Gaussian do?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lightning_revflip.apd import (
    DistilledPosterior,
    ParameterCodec,
    encode_all,
    mode_shares,
    sliced_wasserstein,
)
from lightning_revflip.apd.offline import distil
from lightning_revflip.posterior import LowRankGaussian, SampleBank
from lightning_revflip.posterior.layout import Layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 1000  # weights of a synthetic sample
SAMPLES = 1000
METHODS = ("samples", "low-rank Gaussian", "APD", "APD, no skip", "Gaussian mixture")


@dataclass
class Case:
    """A posterior with known modes. Fits take it as a bank of the samples `train`.

    Attributes:
        name: in the table.
        layout: of the samples.
        train: samples to fit to, shape (n, P).
        held_out: other samples, shape (m, P).
        centres: of the modes, shape (modes, P).
        rank: of the codes.
    """

    name: str
    layout: Layout
    train: Tensor
    held_out: Tensor
    centres: Tensor
    rank: int

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The samples to fit to."""
        yield from self.train.split(size)


def mixture(modes: int, seed: int) -> Case:
    """Normal distributions around random centres; each varies most in five directions of its own.

    Centres are about 45 apart, and the samples of a mode vary by about 6 around them.
    """
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(modes, SIZE, generator=random)
    directions = 5 * torch.randn(modes, 5, SIZE, generator=random) / SIZE**0.5

    def draw() -> Tensor:
        mode = torch.randint(modes, (SAMPLES,), generator=random)
        z = torch.randn(SAMPLES, 1, 5, generator=random)
        noise = 0.1 * torch.randn(SAMPLES, SIZE, generator=random)
        return centres[mode] + (z @ directions[mode]).squeeze(1) + noise

    layout = Layout(("weight",), ((SIZE,),))
    return Case(f"{modes} modes", layout, draw(), draw(), centres, rank=8)


def ring(seed: int) -> Case:
    """Eight modes on a circle of radius 2 in the plane, of standard deviation 0.1."""
    random = torch.Generator().manual_seed(seed)
    angles = torch.arange(8) * torch.pi / 4
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)

    def draw() -> Tensor:
        mode = torch.randint(8, (SAMPLES,), generator=random)
        return centres[mode] + 0.1 * torch.randn(SAMPLES, 2, generator=random)

    return Case("ring of 8", Layout(("weight",), ((2,),)), draw(), draw(), centres, rank=2)


def chains(path: Path) -> Case:
    """The bank of several chains, each a mode; every fifth sample is held out."""
    bank = SampleBank(path)
    fitted, others = [], []
    for number in bank.chains:
        rows = SampleBank(path, chains=[number]).rows()
        held_out = torch.arange(len(rows)) % 5 == 4
        fitted.append(rows[~held_out])
        others.append(rows[held_out])
    centres = torch.stack([rows.mean(0) for rows in fitted])
    name = f"MNIST, {len(centres)} chains"
    return Case(name, bank.layout, torch.cat(fitted), torch.cat(others), centres, rank=20)


Drawn = tuple[Tensor, int | None]
"""Samples, shape (n, P), and the bytes of what they were drawn from."""


def draw(case: Case, method: str, seed: int) -> Drawn:
    """Samples by one of `METHODS`.

    The mixture is one of normal distributions of the codes, as many as there are modes. It alone
    is told how many there are.
    """
    random = torch.Generator().manual_seed(seed)
    if method == "samples":
        return case.train, None
    if method == "Gaussian mixture":
        codec = ParameterCodec.fit(case, case.rank)
        fitted = GaussianMixture(len(case.centres), covariance_type="diag", random_state=seed)
        codes, _ = fitted.fit(encode_all(codec, case).double().numpy()).sample(SAMPLES)
        numbers = fitted.means_.size + fitted.covariances_.size + fitted.weights_.size
        return codec.decode(torch.from_numpy(codes), random), codec.nbytes + 4 * numbers
    fits: dict[str, Callable[[], LowRankGaussian | DistilledPosterior]] = {
        "low-rank Gaussian": partial(
            LowRankGaussian.fit, case, case.rank, "diagonal", dtype=torch.float16
        ),
        "APD": partial(distil, case, case.rank, seed=seed),
        "APD, no skip": partial(distil, case, case.rank, seed=seed, skip=False),
    }
    posterior = fits[method]()
    samples = posterior.sample(SAMPLES, random)
    return torch.cat([samples[name].flatten(1) for name in case.layout.names], 1), posterior.nbytes


Points = dict[str, Tensor]
"""Samples in the plane through the centres of the modes, by the method that drew them."""


def compare(case: Case, seed: int = 0) -> tuple[list[dict[str, Any]], Points]:
    """Modes covered and distance to the held-out samples, by every method; and the samples."""
    plane, middle = plane_through(case.centres), case.centres.mean(0)
    rows, points = [], {}
    for method in METHODS:
        begin = time.process_time()
        samples, nbytes = draw(case, method, seed)
        seconds = time.process_time() - begin
        points[method] = (samples - middle) @ plane
        held_out, centres = ((each - middle) @ plane for each in (case.held_out, case.centres))
        found = in_plane(points[method], held_out, centres)
        row = {"case": case.name, "method": method, "seed": seed, **found}
        rows.append(row if nbytes is None else {**row, "seconds": seconds, "bytes": nbytes})
    return rows, points


def plane_through(centres: Tensor) -> Tensor:
    """Directions of length 1 that span what lies between points, shape (P, points - 1 or P)."""
    directions = torch.linalg.svd(centres - centres.mean(0), full_matrices=False).Vh
    return directions[: len(centres) - 1].T


def in_plane(samples: Tensor, held_out: Tensor, centres: Tensor) -> dict[str, Any]:
    """Figures in the plane through the centres of the modes.

    A sample is at the nearest mode, if that is nearer than half the smallest distance of two modes.
    A mode is covered by a quarter of the samples that it would have if all had equally many.

    Returns:
        `at_modes`, the share of samples at any mode; `covered`, the number of modes; and
        `sliced_wasserstein`, the distance to the held-out samples.
    """
    radius = float(torch.pdist(centres).min()) / 2
    shares = mode_shares(samples, centres, radius)
    directions = torch.Generator().manual_seed(0)
    return {
        "modes": len(centres),
        "covered": int((shares >= 0.25 / len(centres)).sum()),
        "at_modes": float(shares.sum()),
        "sliced_wasserstein": float(sliced_wasserstein(samples, held_out, generator=directions)),
    }


def cases(runs: Path, seed: int) -> Iterator[Case]:
    """All posteriors of a seed."""
    yield chains(runs / f"sgld_chains-{seed}" / "version_0" / "posterior")
    yield ring(seed)
    for modes in (2, 4, 8):
        yield mixture(modes, seed)


def figure(points: Mapping[str, Points]) -> Figure:
    """For each case the samples of every method, in two directions of their plane.

    Cases of two modes, of which there is only one direction, are left out.
    """
    from matplotlib.figure import Figure

    points = {case: each for case, each in points.items() if each["samples"].shape[1] > 1}
    drawn = Figure((2.6 * len(METHODS), 2.6 * len(points)), layout="constrained")
    grid = drawn.subplots(len(points), len(METHODS), squeeze=False)
    for row, (case, methods) in zip(grid, points.items(), strict=True):
        limit = 1.3 * float(methods["samples"][:, :2].abs().max())
        for axes, (method, samples) in zip(row, methods.items(), strict=True):
            axes.scatter(*samples[:, :2].T.numpy(), s=2)
            axes.set(title=method, xticks=[], yticks=[])
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
        row[0].set_ylabel(case)
    return drawn


def table(rows: list[dict[str, Any]]) -> Table:
    """Means over the seeds."""
    keys = ("covered", "at_modes", "sliced_wasserstein", "bytes", "seconds")
    shown = Table("posterior", "method", "modes", *keys)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["method"]), []).append(row)
    for (case, method), own in groups.items():
        cells = [
            f"{statistics.mean(row[key] for row in own):.4g}" if key in own[0] else ""
            for key in keys
        ]
        shown.add_row(case, method, str(own[0]["modes"]), *cells)
    return shown
