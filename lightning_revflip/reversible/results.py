"""What the read-out of a `ReversibleSequence` returns, chunk by chunk, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.reversible.layout import Layout


class Results:
    """What the read-out returned for parts of the steps, put together.

    Scalars are summed (in float64), tensors with time steps are joined.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._found: list[Tensor] | None = None
        self._dtypes: list[torch.dtype] = []

    def add(self, steps: range, result: Sequence[Tensor]) -> None:
        """Add what the read-out returned for some steps."""
        layout = self._layout
        if self._found is None:
            self._dtypes = [part.dtype for part in result]
            self._found = [
                torch.zeros_like(part, dtype=_sum_dtype(part.dtype))
                if part.dim() == 0
                else part.new_empty(
                    layout.shape(range(layout.steps)) + part.shape[layout.leading :]
                )
                for part in result
            ]
        for total, part in zip(self._found, result, strict=True):
            if part.dim() == 0:
                total.add_(part.detach())
            else:
                layout.cut(total, steps).copy_(part.detach())

    def all(self) -> tuple[Tensor, ...]:
        """The results of all steps."""
        assert self._found is not None
        return tuple(t.to(dtype) for t, dtype in zip(self._found, self._dtypes, strict=True))


def checked_result(result: Any, shape: tuple[int, ...], loss: bool | None) -> tuple[Tensor, ...]:
    """What a read-out returned, as a tuple.

    Args:
        result: a tensor or a tuple of them, each a scalar or with the leading dimensions `shape`.
        shape: batch and time dimensions of the steps that the read-out was given.
        loss: whether the first must be a scalar; None: either.

    Raises:
        ValueError: if it is something else.
    """
    parts = result if isinstance(result, tuple) and result else (result,)
    for part in parts:
        scalar_or_steps = isinstance(part, Tensor) and (
            part.dim() == 0 or tuple(part.shape[: len(shape)]) == shape
        )
        if not scalar_or_steps:
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                "read_out must return a scalar loss, or outputs for the time steps it was given "
                f"(leading dimensions {shape}), or a tuple of these; got {got}."
            )
    if loss is not None and (parts[0].dim() == 0) != loss:
        expected = "a scalar loss" if loss else "outputs per time step"
        raise ValueError(
            f"read_out returned {expected} when it was first called in this way, and something "
            "else now. Let what it returns depend on its mode and its arguments only."
        )
    return tuple(parts)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype
