"""From one long text to windows for truncated backpropagation through time (BPTT).

A text of numbers is cut into `batch` contiguous columns, and the columns into windows of some tens
of steps. A model that carries its state from window to window reads every column from its first to
its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Target of a cell that holds no token; `torch.nn.functional.cross_entropy` leaves it out."""


class Window(NamedTuple):
    """What a training or evaluation step gets.

    Attributes:
        inputs: int64, shape (steps, batch).
        targets: int64, shape (steps, batch): the token after each input, or `IGNORED`.
        starts_stream: true for the first window: the state carried so far is to be forgotten.
        lr_scale: number of steps relative to the nominal length; the learning rate follows it.
    """

    inputs: Tensor
    targets: Tensor
    starts_stream: bool
    lr_scale: float


class Streams(NamedTuple):
    """Parallel columns of a text: `inputs` and `targets`, int64, shape (steps, batch)."""

    inputs: Tensor
    targets: Tensor

    def columns(self, chosen: slice) -> Streams:
        """Some of the columns."""
        return Streams(self.inputs[:, chosen], self.targets[:, chosen])


def parallel_streams(text: Tensor, batch: int, keep_all: bool) -> Streams:
    """Cut a text into `batch` columns of equal length.

    Every token but the first is a target once, also where one column ends and the next begins.
    Where the targets do not fill the columns evenly, the fewer than `batch` last ones are dropped
    for training; for evaluation (`keep_all`) the last column is filled up with `IGNORED`.

    Args:
        text: int64, shape (tokens,).
        batch: number of columns.
        keep_all: fill up instead of dropping.

    Raises:
        ValueError: if the text is too short to give every column a target.
    """
    targets = text.numel() - 1
    if targets < batch:
        raise ValueError(
            f"A text of {text.numel()} tokens cannot be cut into {batch} columns: it must have "
            "more tokens than columns. Use a smaller batch size or a longer text."
        )
    steps = -(-targets // batch) if keep_all else targets // batch
    filled = text.new_zeros(steps * batch), text.new_full((steps * batch,), IGNORED)
    count = min(targets, steps * batch)
    filled[0][:count] = text[:count]
    filled[1][:count] = text[1 : count + 1]
    inputs, outputs = (column.view(batch, steps).t().contiguous() for column in filled)
    return Streams(inputs, outputs)


def columns_of_rank(batch: int, rank: int, world_size: int) -> slice:
    """The columns that one of several processes trains on: contiguous, disjoint, all of them.

    The batch size of a run is that of all processes together, so that a run on two devices reads
    the same windows as a run on one.

    Raises:
        ValueError: if the columns cannot be divided evenly.

    >>> [columns_of_rank(20, rank, 4) for rank in (0, 3)]
    [slice(0, 5, None), slice(15, 20, None)]
    """
    if batch % world_size:
        raise ValueError(
            f"A batch of {batch} columns cannot be divided evenly over {world_size} processes. "
            f"Use a batch size that is a multiple of {world_size}, or fewer processes."
        )
    share = batch // world_size
    return slice(rank * share, (rank + 1) * share)


def fixed_lengths(steps: int, bptt: int) -> list[int]:
    """Windows of `bptt` steps; the last one has the rest.

    >>> fixed_lengths(150, 70)
    [70, 70, 10]
    """
    return [min(bptt, steps - start) for start in range(0, steps, bptt)]


def variable_lengths(steps: int, bptt: int, seed: int, epoch: int) -> list[int]:
    """Windows whose length varies, so that an epoch cuts the text where no other does.

    Each length is drawn from N(bptt, 5) with probability 0.95, else from N(bptt / 2, 5), and is at
    least 5; the last window has the rest (Merity et al., 2018, arXiv 1708.02182). The draw depends
    on nothing but `seed` and `epoch`: it is the same in all processes and after a resume.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    lengths = []
    left = steps
    while left > 0:
        full = torch.rand((), generator=generator).item() < 0.95
        deviation = torch.randn((), generator=generator).item()
        length = max(5, int((bptt if full else bptt / 2) + 5 * deviation))
        lengths.append(min(length, left))
        left -= lengths[-1]
    return lengths


class Windows:
    """One pass over parallel streams, from the first window to the last.

    A loader for Lightning: it has a length, and its `state_dict` lets a run that was stopped within
    an epoch go on with the next window.

    Args:
        streams: the columns to read.
        lengths: the number of steps of each window; together the number of steps of the streams.
        bptt: the nominal number of steps, by which `Window.lr_scale` is measured.
    """

    def __init__(self, streams: Streams, lengths: Sequence[int], bptt: int) -> None:
        self.streams = streams
        self.lengths = lengths
        self.bptt = bptt
        self._read = 0  # windows given out in the current pass
        self._first = 0  # window with which the next pass begins

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Window]:
        self._read, self._first = self._first, 0
        start = sum(self.lengths[: self._read])
        for length in self.lengths[self._read :]:
            self._read += 1
            part = slice(start, start + length)
            inputs, targets = self.streams.inputs[part], self.streams.targets[part]
            yield Window(inputs, targets, start == 0, length / self.bptt)
            start += length

    def state_dict(self) -> dict[str, int]:
        """How many windows of the pass were read."""
        return {"read": self._read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass after the windows that were read; after all of them, anew."""
        self._first = state["read"] % len(self)
