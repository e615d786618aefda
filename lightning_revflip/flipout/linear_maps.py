"""The linear maps whose weights are perturbed: matrix product and convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_BYTES = 2**21
"""Inputs of a convolution that are perturbed together on a CPU: they stay in its cache, and their
memory is used again, which a convolution of 32 images of 256 kB gains a sixth of its time by."""


class Grads(NamedTuple):
    """Gradients of a map; None where they are not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class LinearMap(ABC):
    """A map that is linear in input and weight; examples are the first dimension of the input."""

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The map.

        Args:
            x: examples first.
            weight: as torch's own function takes it.
            bias: (outputs,), or None.
        """

    @abstractmethod
    def grads(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        by_x: bool = False,
        by_weight: bool = False,
        by_bias: bool = False,
    ) -> Grads:
        """Gradients by the input, the weight and the bias.

        Args:
            grad: gradient by the output.
            x: that `apply` got.
            weight: that `apply` got.
            by_x: whether the first is wanted.
            by_weight: likewise.
            by_bias: likewise.
        """

    @abstractmethod
    def features(self, x: Tensor) -> int:
        """How many features an input or output has that a sign of their own belongs to."""

    def blocks(self, x: Tensor, examples: slice) -> list[slice]:
        """Some examples, divided into what is best computed together."""
        return [examples]

    @abstractmethod
    def spread_out(self, signs: Tensor, x: Tensor) -> Tensor:
        """Signs (examples, features) in a shape that broadcasts over `x`."""


@dataclass(frozen=True)
class MatrixProduct(LinearMap):
    """`x @ weight.T`: (examples, ..., in), (out, in) -> (examples, ..., out)."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def grads(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        by_x: bool = False,
        by_weight: bool = False,
        by_bias: bool = False,
    ) -> Grads:
        rows = grad.flatten(0, -2)
        return Grads(
            grad @ weight if by_x else None,
            rows.t() @ x.flatten(0, -2) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )

    def features(self, x: Tensor) -> int:
        return x.shape[-1]

    def spread_out(self, signs: Tensor, x: Tensor) -> Tensor:
        return signs.view(len(signs), *[1] * (x.dim() - 2), signs.shape[-1])


@dataclass(frozen=True)
class Convolution(LinearMap):
    """A convolution: (examples, channels, *space), (out channels, channels / groups, *kernel)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = torch.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
        )
        return output

    def grads(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        by_x: bool = False,
        by_weight: bool = False,
        by_bias: bool = False,
    ) -> Grads:
        wanted = (by_x, by_weight, by_bias)
        if not any(wanted):
            return Grads(None, None, None)
        found = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [len(weight)],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            wanted,
        )
        return Grads(
            *(part if is_wanted else None for part, is_wanted in zip(found, wanted, strict=True))
        )

    def blocks(self, x: Tensor, examples: slice) -> list[slice]:
        if x.device.type != "cpu" or len(x) == 0:
            return [examples]
        size = max(1, _BLOCK_BYTES * len(x) // max(1, x.nbytes))
        starts = range(examples.start, examples.stop, size)
        return [slice(start, min(start + size, examples.stop)) for start in starts]

    def features(self, x: Tensor) -> int:
        return x.shape[1]

    def spread_out(self, signs: Tensor, x: Tensor) -> Tensor:
        return signs.view(*signs.shape, *[1] * (x.dim() - 2))
