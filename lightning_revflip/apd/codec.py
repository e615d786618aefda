"""Codecs: samples of all weights to vectors of codes, which a generator can learn, and back.

The generator of Wang et al. makes all P weights, and its last layer alone is as large as its hidden
width in networks. In the whitened principal components of the samples a code has `rank` numbers of
mean 0 and variance 1, whatever the scales of the weights, and the critic sees every direction that
the generator can move in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_revflip.posterior.fitted import normal_rows
from lightning_revflip.posterior.gaussian import LowRankGaussian
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.moments import Rows, check_finite, moments


class Codec(ABC):
    """A map from samples of weights to codes, and back. All of its tensors are on the CPU."""

    layout: Layout
    """Names and shapes of the parameters of one sample."""
    num_samples: int
    """How many samples it was fitted to."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers of a code."""

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """Codes of samples.

        Args:
            rows: samples, shape (n, P), of any dtype and device.

        Returns:
            Shape (n, size), float32, on the CPU.

        Raises:
            ValueError: for another number of columns, and values that are not finite.
        """

    @abstractmethod
    def decode(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples of codes.

        Args:
            codes: shape (n, size), of any dtype and device.
            generator: a CPU generator from which what codes leave out is drawn, row by row; None:
                torch's global one.

        Returns:
            Shape (n, P), float32, on the CPU.

        Raises:
            ValueError: for another number of columns.
        """

    def check_layout(self, layout: Layout, what: str) -> None:
        """Raise unless samples of a layout can be encoded.

        Args:
            layout: of the samples.
            what: whose layout that is, for the message.

        Raises:
            ValueError: for another architecture, naming the first difference.
        """
        self.layout.check(layout, what)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors that define it, by name."""

    def settings(self) -> dict[str, Any]:
        """What else defines it, as plain values."""
        return {
            "kind": type(self).__name__,
            "layout": self.layout.to_json(),
            "num_samples": self.num_samples,
        }

    @staticmethod
    def from_tensors(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codec:
        """The codec that was saved as these settings and tensors, of whichever class.

        Args:
            settings: what `settings()` returned.
            tensors: what `to_tensors()` returned.

        Raises:
            ValueError: for a class of codec that there is not, and tensors of other shapes.
        """
        kinds: dict[str, type[Codec]] = {
            kind.__name__: kind for kind in (ParameterCodec, IdentityCodec)
        }
        if settings["kind"] not in kinds:
            raise ValueError(
                f"there is no codec {settings['kind']!r}, only {', '.join(kinds)}. Was it saved by "
                "a newer version of the package?"
            )
        layout = Layout.from_json(settings["layout"])
        return kinds[settings["kind"]]._restore(layout, settings["num_samples"], tensors)

    @classmethod
    @abstractmethod
    def _restore(cls, layout: Layout, num_samples: int, tensors: Mapping[str, Tensor]) -> Self:
        """The codec with these tensors."""


class ParameterCodec(Codec):
    """Whitened coordinates along the principal components of the samples.

    code = (components (theta - mean)) / component_std
    theta = mean + components^T (component_std * code) + residual_std * e,    e ~ N(0, 1)

    Over the samples that it was fitted to, codes have mean 0, variance 1 and no correlation, so
    that codes drawn from N(0, 1) are samples of the `LowRankGaussian` whose tensors these are.

    Args:
        gaussian: has the mean, the components, and what they leave out of each weight.

    Examples:
        >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
        >>> codec = ParameterCodec.fit(bank, rank=20)  # doctest: +SKIP
        >>> codec.encode(bank.rows([0, 1])).shape  # doctest: +SKIP
        torch.Size([2, 20])
    """

    def __init__(self, gaussian: LowRankGaussian) -> None:
        self.gaussian = gaussian
        self.layout = gaussian.layout
        self.num_samples = gaussian.num_samples

    @classmethod
    def fit(
        cls,
        bank: Rows,
        rank: int,
        *,
        residual: Literal["diagonal"] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> Self:
        """Fit to samples, which are read in chunks and never in memory together.

        Args:
            bank: samples, such as a `SampleBank`.
            rank: numbers of a code, from 1 to one less than the samples.
            residual: `diagonal`: decoding adds to each weight the variance that the components
                leave out; None: it adds nothing.
            dtype: of the components: float32, float16 or bfloat16.

        Raises:
            ValueError: for a rank out of range, and samples that are not finite.
        """
        return cls(LowRankGaussian.fit(bank, rank, residual, dtype=dtype))

    @property
    def size(self) -> int:
        return self.gaussian.rank

    def encode(self, rows: Tensor) -> Tensor:
        rows = _checked_rows(rows, self.layout)
        std = self.gaussian.component_std
        # Along a component without variance all samples agree, and their code is 0.
        scale = torch.where(std > 0, std, torch.inf).reciprocal()
        return (rows - self.gaussian.mean) @ self.gaussian.components.float().T * scale

    def decode(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        codes = _checked_codes(codes, self.size)
        rows = self.gaussian.mean.expand(len(codes), -1)
        if self.gaussian.residual_std is not None:
            noise = normal_rows(len(codes), self.layout.numel, generator)
            rows = noise.mul_(self.gaussian.residual_std).add_(self.gaussian.mean)
        weights = codes * self.gaussian.component_std
        return torch.addmm(rows, weights, self.gaussian.components.float())

    def to_tensors(self) -> dict[str, Tensor]:
        return self.gaussian.to_tensors()

    @classmethod
    def _restore(cls, layout: Layout, num_samples: int, tensors: Mapping[str, Tensor]) -> Self:
        return cls(LowRankGaussian(layout, **tensors, num_samples=num_samples))

    def __repr__(self) -> str:
        kind = "no" if self.gaussian.residual_std is None else "diagonal"
        return (
            f"ParameterCodec({self.layout.numel:,} parameters, rank {self.size}, {kind} residual, "
            f"of {self.num_samples:,} samples)"
        )


class IdentityCodec(Codec):
    """A code is the weights themselves, as in the paper: neither centred nor scaled.

    Args:
        layout: names and shapes of the parameters.
        num_samples: how many samples there are.
    """

    def __init__(self, layout: Layout, *, num_samples: int) -> None:
        self.layout = layout
        self.num_samples = num_samples

    @classmethod
    def fit(cls, bank: Rows) -> Self:
        """Read all samples once, to count and to check them.

        Args:
            bank: samples, such as a `SampleBank`.

        Raises:
            ValueError: for fewer than two samples, and values that are not finite.
        """
        return cls(bank.layout, num_samples=moments(bank).count)

    @property
    def size(self) -> int:
        return self.layout.numel

    def encode(self, rows: Tensor) -> Tensor:
        return _checked_rows(rows, self.layout)

    def decode(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _checked_codes(codes, self.size)

    def to_tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def _restore(cls, layout: Layout, num_samples: int, tensors: Mapping[str, Tensor]) -> Self:
        return cls(layout, num_samples=num_samples)

    def __repr__(self) -> str:
        return f"IdentityCodec({self.layout.numel:,} parameters, of {self.num_samples:,} samples)"


def encode_all(codec: Codec, bank: Rows, chunk_size: int = 64) -> Tensor:
    """Codes of all samples of a bank, which are read in chunks.

    Args:
        codec: makes codes.
        bank: samples, such as a `SampleBank`.
        chunk_size: samples that are in memory at a time.

    Returns:
        Shape (K, size), float32, on the CPU.

    Raises:
        ValueError: for a bank of another architecture, naming the first difference, and values
            that are not finite.
    """
    codec.check_layout(bank.layout, "the bank")
    return torch.cat([codec.encode(rows) for rows in bank.chunks(chunk_size)])


def _checked_rows(rows: Tensor, layout: Layout) -> Tensor:
    """Rows in float32 on the CPU."""
    rows = rows.detach().to("cpu", torch.float32)
    check_finite(rows, layout)
    return rows


def _checked_codes(codes: Tensor, size: int) -> Tensor:
    """Codes in float32 on the CPU."""
    if codes.dim() != 2 or codes.shape[1] != size:
        raise ValueError(f"codes must have shape (n, {size}), got {tuple(codes.shape)}.")
    return codes.detach().to("cpu", torch.float32)
