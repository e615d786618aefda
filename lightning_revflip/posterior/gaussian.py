"""`LowRankGaussian` and `DiagonalGaussian`: normal distributions fitted to samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_revflip.posterior.fitted import FittedPosterior, normal_rows
from lightning_revflip.posterior.layout import Layout, Parameters
from lightning_revflip.posterior.moments import (
    Rows,
    last_deviations,
    moments,
    principal_components,
)
from lightning_revflip.posterior.tensor_folder import load_tensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Gaussian(FittedPosterior):
    """What the two have in common: parameters are mean + (a linear map of normal numbers)."""

    def draw_chunks(
        self, n: int, chunk_size: int, generator: torch.Generator | None
    ) -> Iterator[Parameters]:
        for start in range(0, n, chunk_size):
            noise = normal_rows(min(chunk_size, n - start), self._noise_size, generator)
            yield self.layout.unflatten(self._rows(noise))

    def settings(self) -> dict[str, Any]:
        """Layout and number of samples, as plain values."""
        return {"layout": self.layout.to_json(), "num_samples": self.num_samples}

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        values, tensors = load_tensors(path, cls.__name__)
        arguments: dict[str, Any] = {
            "layout": Layout.from_json(values["layout"]),
            "num_samples": values["num_samples"],
        }
        return cls(**arguments, **tensors)

    @property
    @abstractmethod
    def _noise_size(self) -> int:
        """Normal numbers of one sample."""

    @abstractmethod
    def _rows(self, noise: Tensor) -> Tensor:
        """Samples, shape (n, P), of normal numbers, shape (n, _noise_size)."""


class DiagonalGaussian(_Gaussian):
    """Independent normal distributions of all parameters.

    Args:
        layout: names and shapes of the parameters.
        mean: shape (P,), float32.
        std: standard deviations, shape (P,), float32.
        num_samples: how many samples it was fitted to.

    Raises:
        ValueError: for other shapes.

    Examples:
        >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
        >>> DiagonalGaussian.fit(bank).save("runs/mnist/diagonal")  # doctest: +SKIP
    """

    def __init__(self, layout: Layout, mean: Tensor, std: Tensor, *, num_samples: int) -> None:
        self.layout = layout
        self.mean = mean
        self.std = std
        self.num_samples = num_samples
        _check_shapes(self.to_tensors(), mean=(layout.numel,), std=(layout.numel,))

    @classmethod
    def fit(cls, bank: Rows) -> Self:
        """Fit mean and unbiased variance of each parameter, reading the samples in chunks.

        Args:
            bank: samples, such as a `SampleBank`.

        Raises:
            ValueError: for fewer than two samples, and values that are not finite.
        """
        found = moments(bank)
        std = found.variance.sqrt().float()
        return cls(bank.layout, found.mean.float(), std, num_samples=found.count)

    def __repr__(self) -> str:
        return f"DiagonalGaussian({self.layout.numel} parameters, of {len(self)} samples)"

    @property
    def _noise_size(self) -> int:
        return self.layout.numel

    def _rows(self, noise: Tensor) -> Tensor:
        return noise.mul_(self.std).add_(self.mean)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std}


class LowRankGaussian(_Gaussian):
    """A normal distribution whose parameters vary together in a few directions.

    theta = mean + components^T (component_std * z) + residual_std * e,    z, e ~ N(0, 1)

    `fit` gives it the principal components of samples, `swag` the distribution of Maddox et al.

    Args:
        layout: names and shapes of the parameters.
        mean: shape (P,), float32.
        components: directions of length 1, shape (rank, P), float32, float16 or bfloat16.
        component_std: standard deviation along each, shape (rank,), float32.
        residual_std: standard deviation of each parameter beside the components, shape (P,),
            float32; None: 0.
        num_samples: how many samples it was fitted to.

    Raises:
        ValueError: for other shapes and dtypes.

    Examples:
        >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
        >>> gaussian = LowRankGaussian.fit(bank, rank=20)  # doctest: +SKIP
        >>> gaussian.predict(network, images, n=50).shape  # doctest: +SKIP
        torch.Size([50, 128, 10])
    """

    def __init__(
        self,
        layout: Layout,
        mean: Tensor,
        components: Tensor,
        component_std: Tensor,
        residual_std: Tensor | None = None,
        *,
        num_samples: int,
    ) -> None:
        self.layout = layout
        self.mean = mean
        self.components = components
        self.component_std = component_std
        self.residual_std = residual_std
        self.num_samples = num_samples
        size, rank = layout.numel, len(component_std)
        _check_dtype(components.dtype)
        _check_shapes(
            self.to_tensors(),
            mean=(size,),
            components=(rank, size),
            component_std=(rank,),
            residual_std=(size,),
        )

    @classmethod
    def fit(
        cls,
        bank: Rows,
        rank: int,
        residual: Literal["diagonal"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Fit the leading principal components, reading the samples in chunks.

        Of K samples their K x K products are formed, K^2 P operations, and decomposed; two chunks
        of at most 256 MiB are in memory at a time.

        Args:
            bank: samples, such as a `SampleBank`.
            rank: number of components, from 1 to K - 1.
            residual: None: samples lie in the space of the components; with rank K - 1 they have
                exactly the covariance of the samples. `diagonal` also keeps what the components
                leave out of the variance of each parameter, which then is that of the samples.
                That noise is independent in each parameter, as it is not in the samples: networks
                drawn with it had a worse likelihood than those without where both were measured
                (`benchmarks/results/apd.json`).
            dtype: in which the components are kept, in memory and on disk; float16 halves them.

        Raises:
            ValueError: for another rank or residual, fewer than two samples, and values that are
                not finite.
        """
        if residual not in ("diagonal", None):
            raise ValueError(f"residual must be 'diagonal' or None, got {residual!r}.")
        _check_dtype(dtype)
        found = moments(bank)
        _check_rank(rank, 1, found.count)
        basis, wide_std = principal_components(bank, found, rank)
        components, std = basis.to(dtype), wide_std.float()
        residual_std = None
        if residual == "diagonal":
            left = found.variance
            for component, scale in zip(components, std, strict=True):
                left = left - (component.double() * scale).square()
            residual_std = left.clamp_min(0).sqrt().float()  # below 0 only by rounding
        arguments = (bank.layout, found.mean.float(), components, std, residual_std)
        return cls(*arguments, num_samples=found.count)

    @classmethod
    def swag(cls, bank: Rows, rank: int, dtype: torch.dtype = torch.float32) -> Self:
        """Fit the distribution SWAG (Maddox et al., 2019, arXiv 1902.02476).

        Half of the covariance is diagonal, the variance of each parameter (over K samples, not
        K - 1). Half has low rank: D D^T / (rank - 1), where D has the deviations of the last
        `rank` samples from the mean of all samples up to each.

        Args:
            bank: the samples of one chain in the order of time.
            rank: number of deviations, from 2 to K - 1.
            dtype: in which they are kept, in memory and on disk.

        Raises:
            ValueError: for another rank, fewer than two samples, and values that are not finite.
        """
        _check_dtype(dtype)
        found = moments(bank)
        _check_rank(rank, 2, found.count)
        deviations = last_deviations(bank, found.count, rank)
        lengths = deviations.norm(dim=1)
        components = deviations / lengths.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        variance = found.variance * (found.count - 1) / found.count
        return cls(
            bank.layout,
            found.mean.float(),
            components.to(dtype),
            lengths / (2 * (rank - 1)) ** 0.5,
            (variance / 2).sqrt().float(),
            num_samples=found.count,
        )

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.component_std)

    def __repr__(self) -> str:
        kind = "no" if self.residual_std is None else "diagonal"
        return (
            f"LowRankGaussian({self.layout.numel} parameters, rank {self.rank}, {kind} residual, "
            f"of {len(self)} samples)"
        )

    @property
    def _noise_size(self) -> int:
        return self.rank + (0 if self.residual_std is None else self.layout.numel)

    def _rows(self, noise: Tensor) -> Tensor:
        rows = self.mean.expand(len(noise), -1)
        if self.residual_std is not None:
            rows = rows + noise[:, self.rank :] * self.residual_std
        weights = noise[:, : self.rank] * self.component_std
        return torch.addmm(rows, weights, self.components.float())

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {
            "mean": self.mean,
            "components": self.components,
            "component_std": self.component_std,
        }
        if self.residual_std is not None:
            tensors["residual_std"] = self.residual_std
        return tensors


def _check_rank(rank: int, least: int, count: int) -> None:
    if not least <= rank <= count - 1:
        raise ValueError(
            f"rank must be from {least} to {count - 1}, one less than the {count} samples, got "
            f"{rank}. Collect more samples, or choose a smaller rank."
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"components are kept as one of {_DTYPES}, got {dtype}.")


def _check_shapes(tensors: dict[str, Tensor], **shapes: tuple[int, ...]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{name} must have the shape {shapes[name]}, got {tuple(tensor.shape)}."
            )
