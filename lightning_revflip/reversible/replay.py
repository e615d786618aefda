"""Random numbers that come out the same when a chunk of time steps is run again.

The modules inside a `ReversibleSequence` run at least twice on each chunk: forward, and again when
the chunk has been reversed. Two kinds of randomness are replayed:

- per step (`nn.Dropout` and whatever else uses torch's global generators): the generators are
  seeded from a seed of the pass and the position of the call, and given back as they were;
- per sequence (subclasses of `SequenceNoise`): drawn once, before the pass, and kept with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_current: ContextVar[Replay | None] = ContextVar("replay", default=None)
_packed: ContextVar[PackedRows | None] = ContextVar("packed", default=None)


class PackedRows(NamedTuple):
    """To which sequence each row of a chunk of packed sequences belongs."""

    batch: int
    sequences: Tensor
    """int64, shape (rows,)."""
    sizes: Sequence[int]
    """Rows of each time step; those of a step belong to the first sequences."""


def packed_rows() -> PackedRows | None:
    """What the rows are that a module of a `ReversibleSequence` is being called with.

    None unless the sequences are packed.
    """
    return _packed.get()


class SequenceNoise(nn.Module, ABC):
    """Base of modules whose random numbers are drawn once per sequence and hold at every step.

    Outside a `ReversibleSequence` a call is a sequence, so every call draws.
    """

    @abstractmethod
    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Draw the noise of a batch of sequences from torch's global generators.

        Args:
            batch: number of sequences.
            device: of the result.

        Returns:
            Shape (batch, ...), or whatever `forward` makes use of.
        """

    def noise(self, batch: int, device: torch.device) -> Tensor:
        """The noise of the sequences that are running, or fresh noise; for `forward` to call.

        Args:
            batch: number of sequences.
            device: of the result.

        Returns:
            What `draw` returned.
        """
        replay = _current.get()
        if replay is not None and self in replay.noise:
            return replay.noise[self]
        return self.draw(batch, device)


class LockedDropout(SequenceNoise):
    """Dropout of the same units at every step (Gal and Ghahramani, 2016, arXiv 1512.05287).

    Acts in training only. Takes and returns (steps, batch, features), (batch, steps, features) with
    `batch_first`, or, within a `ReversibleSequence` of a PackedSequence, (rows, features).

    Args:
        features: size of the last dimension.
        p: probability with which a unit of a sequence is dropped.
        batch_first: whether the first dimension is the batch.

    Raises:
        ValueError: for `p` outside [0, 1), or an input of another number of features.

    Examples:
        >>> dropped = LockedDropout(4, p=0.5)(torch.ones(3, 2, 4))
        >>> bool((dropped[0] == dropped[2]).all())
        True
    """

    def __init__(self, features: int, p: float = 0.5, batch_first: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be at least 0 and below 1, got {p}.")
        self.features = features
        self.p = p
        self.batch_first = batch_first

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """What the units are multiplied by: 0 or 1 / (1 - p), float32, (batch, features)."""
        return F.dropout(torch.ones(batch, self.features, device=device), self.p)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the mask.

        Args:
            x: input, see the class for its shape.

        Raises:
            ValueError: for another number of features or dimensions.
        """
        if x.shape[-1] != self.features:
            raise ValueError(
                f"LockedDropout({self.features}) got an input of {x.shape[-1]} features; give it "
                "the size of the last dimension."
            )
        if not self.training or self.p == 0:
            return x
        packed = packed_rows()
        if x.dim() == 2 and packed is not None:
            return x * self.noise(packed.batch, x.device)[packed.sequences].to(x.dtype)
        if x.dim() != 3:
            raise ValueError(
                "LockedDropout takes 3 dimensions, one of them the batch (or packed rows within a "
                f"ReversibleSequence), got shape {tuple(x.shape)}."
            )
        mask = self.noise(x.shape[0 if self.batch_first else 1], x.device).to(x.dtype)
        return x * mask.unsqueeze(1 if self.batch_first else 0)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.features}, p={self.p}" + (", batch_first=True" if self.batch_first else "")


@dataclass(frozen=True)
class Replay:
    """The randomness of one pass over a batch of sequences."""

    seed: int
    noise: Mapping[SequenceNoise, Tensor]
    device: torch.device

    @classmethod
    def draw(cls, module: nn.Module, batch: int, device: torch.device) -> Replay:
        """Draw the noise of all `SequenceNoise` in `module`, then a seed, in training only."""
        noise = {
            part: part.draw(batch, device)
            for part in module.modules()
            if isinstance(part, SequenceNoise) and part.training
        }
        training = any(part.training for part in module.modules())
        seed = int(torch.randint(2**62, ())) if training else 0
        return cls(seed, noise, device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this context the noise is that of this pass; afterwards generators are as before.

        Every call within it must be preceded by `at`.
        """
        generators = self._generators()
        states = [generator.get_state() for generator in generators]
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    @contextmanager
    def at(self, *position: int, packed: PackedRows | None = None) -> Iterator[None]:
        """Seed the generators for a call, given the position of the call in the pass.

        Args:
            position: numbers that no other call shares.
            packed: for packed rows.
        """
        seed = hash((self.seed, *position)) & (2**63 - 1)
        for generator in self._generators():
            generator.manual_seed(seed)
        token = _packed.set(packed)
        try:
            yield
        finally:
            _packed.reset(token)

    def _generators(self) -> list[torch.Generator]:
        generators = [torch.default_generator]
        if self.device.type == "cuda":
            index = self.device.index
            generators.append(torch.cuda.default_generators[index])
        return generators
