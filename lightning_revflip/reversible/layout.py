"""How the steps of a batch of sequences lie in a tensor, and how to cut chunks from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lightning_revflip.reversible.replay import PackedRows


@dataclass(frozen=True)
class Layout:
    """The layout of everything that has time steps.

    Args:
        batch_sizes: sequences alive at each step.
        batch_first: (batch, steps, ...) instead of (steps, batch, ...).
        packed: (rows, ...) as in `PackedSequence.data`, step after step.
    """

    batch_sizes: tuple[int, ...]
    batch_first: bool = False
    packed: bool = False

    @property
    def steps(self) -> int:
        """Number of time steps."""
        return len(self.batch_sizes)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.batch_sizes[0]

    @property
    def leading(self) -> int:
        """How many leading dimensions hold steps and batch."""
        return 1 if self.packed else 2

    @property
    def time_dim(self) -> int:
        """The dimension along which steps are joined."""
        return 1 if self.batch_first and not self.packed else 0

    @cached_property
    def _offsets(self) -> list[int]:
        return [0, *accumulate(self.batch_sizes)]

    def rows(self, steps: range) -> slice:
        """Rows of some steps when step after step is stored."""
        return slice(self._offsets[steps.start], self._offsets[steps.stop])

    def shape(self, steps: range) -> tuple[int, ...]:
        """Leading dimensions of a tensor that holds these steps."""
        if self.packed:
            rows = self.rows(steps)
            return (rows.stop - rows.start,)
        shape = (len(steps), self.batch)
        return shape[::-1] if self.batch_first else shape

    def cut(self, tensor: Tensor, steps: range) -> Tensor:
        """The part of a tensor that belongs to some steps, as a view."""
        if self.packed:
            return tensor[self.rows(steps)]
        return tensor.narrow(self.time_dim, steps.start, len(steps))

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor of steps as (rows, features), step after step, contiguous."""
        if self.packed:
            return tensor.contiguous()
        if self.batch_first:
            tensor = tensor.transpose(0, 1)
        return tensor.flatten(0, 1).contiguous()

    def unflat(self, rows: Tensor, steps: range) -> Tensor:
        """The inverse of `flat`, as a view."""
        if self.packed:
            return rows
        tensor = rows.view(len(steps), self.batch, rows.shape[-1])
        return tensor.transpose(0, 1) if self.batch_first else tensor

    def packed_rows(self, steps: range, device: torch.device) -> PackedRows | None:
        """To which sequence each row belongs, for packed sequences."""
        if not self.packed:
            return None
        if self._sequences.device != device:
            self.__dict__["_sequences"] = self._sequences.to(device)  # once, as it waits for a GPU
        sizes = self.batch_sizes[steps.start : steps.stop]
        return PackedRows(self.batch, self._sequences[self.rows(steps)], sizes)

    @cached_property
    def _sequences(self) -> Tensor:
        """The sequence of every row."""
        return torch.cat([torch.arange(size) for size in self.batch_sizes])
