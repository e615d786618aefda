"""Units of h that are kept as they are after every step, instead of the bits that they forget.

What reads hidden states of every step later on, as attention does, needs them as floats. A unit
whose floats are kept needs no information buffer: its state before a step is simply known. So it
is multiplied by its forget gate with plain rounding, and put back from the floats in reverse
(MacKay et al., 2018, section 5.2, who let attention see a slice of 20 units of 300).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.reversible.buffer import InformationBuffer
from lightning_revflip.reversible.cells import Cell

_BLOCK_ROWS = 1024


class HiddenSlice(nn.Module):
    """Read-out that returns the first units of h, for what looks at all steps later on.

    A `ReversibleSequence` with this read-out keeps what it returns, and nothing of what these units
    forget. The result holds the exact states, in float32 at least; it has a copy of its own, so
    the states themselves are free.

    Args:
        units: how many; 0 for none, at most the hidden_size of the layer.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> HiddenSlice(2)(torch.arange(6.0).view(2, 3))
        tensor([[0., 1.],
                [3., 4.]])
    """

    with_inputs = False
    """Whether a second result stands for the inputs of the recurrent layer, see `stand_in`."""

    def __init__(self, units: int) -> None:
        super().__init__()
        if type(units) is not int or units < 0:
            raise ValueError(f"units must be a whole number, 0 or more, got {units!r}.")
        self.units = units

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., units)."""
        return hidden[..., : self.units].clone()

    def extra_repr(self) -> str:
        """The number of units."""
        return str(self.units)


def stand_in(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of some shape that take no memory, for a value that can be made again.

    What makes the value again adds these zeros to it. So its gradient finds the way to where the
    value came from first.
    """
    return like.new_zeros(()).expand(*shape)


class Slices:
    """The first units of h of a layer after every step of a pass.

    Args:
        cell: of the layer.
        units: how many.
        batch_sizes: sequences alive at each step.
        device: of the layer.
    """

    def __init__(
        self, cell: Cell[Any], units: int, batch_sizes: Sequence[int], device: torch.device
    ) -> None:
        self.cell = cell
        self.units = units
        self._device = device
        self._rows = sum(batch_sizes)
        starts = [0, *accumulate(batch_sizes)]
        self._before = dict(zip(starts[1:], starts, strict=False))
        """First row of the step before the one that begins at a row."""
        split = min(units, cell.half)
        self._parts = (slice(0, split), slice(split, units))
        """Of the kept units, those that belong to either half."""
        first = (cell.states - 1) * cell.half
        self.columns = [slice(first, first + p.stop - p.start) for p in self._parts]
        """Of the states and forget gates of either half, those of the kept units."""
        self._integers: Tensor | None = None
        self._floats: Tensor | None = None
        self._residual: Tensor | None = None
        self._initial: list[Tensor] = []

    # --- forward -----------------------------------------------------------------------------

    def keep(self, first: int, half: int, state: Tensor) -> None:
        """Keep what a half-step made.

        Args:
            first: row at which the step begins.
            half: 0 or 1.
            state: of the half, (rows, states * half).
        """
        if self._integers is None:
            shape = (self._rows, self.units)
            self._integers = torch.empty(shape, dtype=torch.int32, device=self._device)
        part = self._parts[half]
        self._integers[first : first + len(state), part] = state[:, self.columns[half]].int()

    def floats(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What was kept, as floats, (rows, units), and what they lack, or None if they are exact.

        They take the place of the integers in memory. float32 has 24 digits: states of RevLSTM that
        outgrow 16 need the second tensor, int32, of the same shape.
        """
        integers, self._integers = self._integers, None
        assert integers is not None
        fixed_point = self.cell.fixed_point
        if dtype == torch.float64:
            return fixed_point.to_float(integers, dtype), None
        floats = integers.view(torch.float32)
        residual: Tensor | None = None
        parts = (torch.split(integers, _BLOCK_ROWS), torch.split(floats, _BLOCK_ROWS))
        for number, (block, target) in enumerate(zip(*parts, strict=True)):
            exact = block.double()
            target.copy_(fixed_point.to_float(exact, torch.float32))
            lost = (exact - fixed_point.from_float(target)).int()
            if residual is None and bool(lost.any()):
                residual = torch.zeros_like(integers)
            if residual is not None:
                torch.split(residual, _BLOCK_ROWS)[number].copy_(lost)
        return floats, residual

    # --- backward ----------------------------------------------------------------------------

    def restore(self, floats: Tensor, residual: Tensor | None, initial: Sequence[Tensor]) -> None:
        """Take back what `floats` returned.

        Args:
            floats: (rows, units).
            residual: the same shape, or None.
            initial: states of the halves before the first step, (batch, states * half).
        """
        self._floats, self._residual = floats, residual
        self._initial = [
            state[:, columns].double() for state, columns in zip(initial, self.columns, strict=True)
        ]

    def before(self, first: int, rows: int, half: int) -> Tensor:
        """States of the kept units before the step that begins at a row: float64 integers."""
        if first == 0:
            return self._initial[half][:rows]
        assert self._floats is not None
        start = self._before[first]
        part = (slice(start, start + rows), self._parts[half])
        state = self.cell.fixed_point.from_float(self._floats[part])
        return state if self._residual is None else state.add_(self._residual[part])

    # --- both --------------------------------------------------------------------------------

    def buffer(self, buffer: InformationBuffer, first: int, half: int) -> InformationBuffer:
        """The buffer of a half for the step that begins at a row, without the kept units."""
        part = self._parts[half]
        return buffer if part.start == part.stop else _SlicedBuffer(buffer, self, first, half)

    def forgetting(self, gates: Tensor, half: int) -> Tensor:
        """The forget gates whose bits are stored: those of all other units, flat."""
        columns = self.columns[half]
        rest = [gates[:, : columns.start], gates[:, columns.stop :]]
        return torch.cat([part.reshape(-1) for part in rest])


class _SlicedBuffer(InformationBuffer):
    """A buffer that leaves the kept units of a half out."""

    def __init__(self, buffer: InformationBuffer, slices: Slices, first: int, half: int) -> None:
        super().__init__(buffer.state, buffer.words)
        self._buffer = buffer
        self._slices = slices
        self._step = (first, half)
        self._columns = slices.columns[half]

    def _others(self, gate: Tensor) -> Tensor:
        """The gates, with those of the kept units replaced by one, which changes nothing."""
        gate = gate.clone()
        gate[:, self._columns] = self._buffer.gate_one
        return gate

    def multiply_(self, h: Tensor, gate: Tensor) -> None:
        self._buffer.multiply_(h, self._others(gate))
        factor = gate[:, self._columns].double() / self._buffer.gate_one
        h[:, self._columns] = (h[:, self._columns] * factor).round_()

    def divide_(self, h: Tensor, gate: Tensor) -> None:
        self._buffer.divide_(h, self._others(gate))
        first, half = self._step
        h[:, self._columns] = self._slices.before(first, len(h), half).to(h.dtype)
