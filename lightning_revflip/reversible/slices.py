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

from lightning_revflip.reversible.buffer import HIGHEST, LOWEST, InformationBuffer
from lightning_revflip.reversible.cells import Cell, Undone
from lightning_revflip.reversible.errors import ReversalError

_BLOCK_ROWS = 1024


class HiddenSlice(nn.Module):
    """Read-out that returns the first units of h, for what looks at all steps later on.

    A `ReversibleSequence` with this read-out keeps what it returns, and nothing of what these units
    forget. The result holds the exact states, in float32 at least; it has a copy of its own, so
    the states themselves are free.

    Args:
        units: how many; 0 for none, at most the hidden_size of the layer.
        with_inputs: have a ReversibleSequence return a second result: a `stand_in` for the inputs
            of the first layer, through which a gradient of theirs can come.

    Raises:
        ValueError: for a negative number.

    Examples:
        >>> HiddenSlice(2)(torch.arange(6.0).view(2, 3))
        tensor([[0., 1.],
                [3., 4.]])
    """

    def __init__(self, units: int, *, with_inputs: bool = False) -> None:
        super().__init__()
        if type(units) is not int or units < 0:
            raise ValueError(f"units must be a whole number, 0 or more, got {units!r}.")
        self.units = units
        self.with_inputs = with_inputs

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
        self._initial: list[Tensor] = []
        self._differing = torch.zeros((), dtype=torch.int64, device=device)
        """Undone states that are not those that were kept."""

    # --- forward -----------------------------------------------------------------------------

    def keep(self, first: int, half: int, state: Tensor, buffer: InformationBuffer) -> None:
        """Keep what a half-step made.

        Args:
            first: row at which the step begins.
            half: 0 or 1.
            state: of the half, (rows, states * half).
            buffer: of the half.
        """
        if buffer.fused:
            self._fill(buffer, half, len(state), LOWEST)
        if self._integers is None:
            shape = (self._rows, self.units)
            self._integers = torch.empty(shape, dtype=torch.int32, device=self._device)
        part = self._parts[half]
        self._integers[first : first + len(state), part] = state[:, self.columns[half]].int()

    def floats(self, dtype: torch.dtype) -> Tensor:
        """What was kept, as floats, (rows, units), in the place of the integers in memory.

        float32 has 24 digits, which states of RevLSTM that outgrow 16 exceed. Whatever a sweep back
        makes of a kept unit it makes of its float, so the digits beyond are not missed.
        """
        integers, self._integers = self._integers, None
        assert integers is not None
        if dtype == torch.float64:
            return self.cell.fixed_point.to_float(integers, dtype)
        floats = integers.view(torch.float32)
        parts = (torch.split(integers, _BLOCK_ROWS), torch.split(floats, _BLOCK_ROWS))
        for block, target in zip(*parts, strict=True):
            target.copy_(self.cell.fixed_point.to_float(block, torch.float32))
        return floats

    # --- backward ----------------------------------------------------------------------------

    def restore(self, floats: Tensor, initial: Sequence[Tensor]) -> None:
        """Take back what `floats` returned.

        Args:
            floats: (rows, units).
            initial: states of the halves before the first step, (batch, states * half).
        """
        self._floats = floats
        self._initial = [
            state[:, columns].double() for state, columns in zip(initial, self.columns, strict=True)
        ]

    def before(self, first: int, rows: int, half: int) -> Tensor:
        """States of the kept units before the step that begins at a row: float64 integers.

        Exactly what they were before the first step, with the digits of a float before others.
        """
        if first == 0:
            return self._initial[half][:rows]
        assert self._floats is not None
        start = self._before[first]
        part = (slice(start, start + rows), self._parts[half])
        return self.cell.fixed_point.from_float(self._floats[part])

    def put_back(
        self, first: int, half: int, state: Tensor, undone: Undone, buffer: InformationBuffer
    ) -> None:
        """Replace what kernels made of the kept units when they undid a half-step.

        There nothing is compared, as `agree` does elsewhere: that weights have changed shows in
        the other units, and not at all where all units of a RevGRU are kept.

        Args:
            first: row at which the step begins.
            half: 0 or 1.
            state: of the half, (rows, states * half).
            undone: what the cell's `reverse_` returned.
            buffer: of the half.
        """
        if not buffer.fused:
            return  # a _SlicedBuffer did so already
        rows = len(state)
        before = self.before(first, rows, half)
        state[:, self.columns[half]] = before.to(state.dtype)
        undone.h[:, : self._width(half)] = self.cell.fixed_point.to_float(before, undone.h.dtype)
        self._fill(buffer, half, rows, LOWEST)

    def agree(self, undone: Tensor, expected: Tensor) -> None:
        """Remember whether undone states of kept units are those that the forward step made.

        States from 2^24 are rounded to float32.
        """
        tolerance = (undone.abs() + expected.abs()).mul_(2.0**-23).add_(1.0)
        self._differing += ((undone - expected).abs() > tolerance).sum()

    def check(self) -> None:
        """Raise a ReversalError unless all undone states of kept units agreed."""
        differing = int(self._differing)
        if differing:
            raise ReversalError(f"{differing} states of kept units differ from what was kept")

    # --- both --------------------------------------------------------------------------------

    def forward_buffer(self, buffer: InformationBuffer, half: int) -> InformationBuffer:
        """The buffer of a half for a step forward, without the kept units."""
        if buffer.fused:
            buffer.kept_units = self._width(half)
        elif self._width(half):
            return _SlicedBuffer(buffer, self, half)
        return buffer

    def reverse_buffer(
        self, buffer: InformationBuffer, first: int, half: int, rows: int
    ) -> InformationBuffer:
        """The same to undo the step of so many rows that begins at a row."""
        if buffer.fused:
            self._fill(buffer, half, rows, HIGHEST)  # asks for no word
        elif self._width(half):
            return _SlicedBuffer(buffer, self, half, self.before(first, rows, half))
        return buffer

    def forgetting(self, gates: Tensor, half: int) -> Tensor:
        """The forget gates whose bits are stored: those of all other units, flat."""
        columns = self.columns[half]
        rest = [gates[:, : columns.start], gates[:, columns.stop :]]
        return torch.cat([part.reshape(-1) for part in rest])

    def _width(self, half: int) -> int:
        """How many units of a half are kept."""
        return self._parts[half].stop - self._parts[half].start

    def _fill(self, buffer: InformationBuffer, half: int, rows: int, value: int) -> None:
        buffer.state[:rows, self.columns[half]] = value


class _SlicedBuffer(InformationBuffer):
    """A buffer that leaves the kept units of a half out.

    Args:
        buffer: of all units.
        slices: of the layer.
        half: 0 or 1.
        before: states of the kept units before the step that is to be undone.
    """

    def __init__(
        self, buffer: InformationBuffer, slices: Slices, half: int, before: Tensor | None = None
    ) -> None:
        super().__init__(buffer.state, buffer.words)
        self._buffer = buffer
        self._slices = slices
        self._before = before
        self._columns = slices.columns[half]

    def _kept(self, gate: Tensor) -> Tensor:
        """The gates of the kept units, float64."""
        return gate[:, self._columns].double() / self._buffer.gate_one

    def _others(self, gate: Tensor) -> Tensor:
        """The gates, with those of the kept units replaced by one, which changes nothing."""
        gate = gate.clone()
        gate[:, self._columns] = self._buffer.gate_one
        return gate

    def multiply_(self, h: Tensor, gate: Tensor) -> None:
        self._buffer.multiply_(h, self._others(gate))
        h[:, self._columns] = (h[:, self._columns] * self._kept(gate)).round_()

    def divide_(self, h: Tensor, gate: Tensor) -> None:
        assert self._before is not None
        self._buffer.divide_(h, self._others(gate))
        kept = h[:, self._columns]
        self._slices.agree(kept, (self._before * self._kept(gate)).round_())
        kept.copy_(self._before)
