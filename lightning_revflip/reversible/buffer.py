r"""The information buffer: multiply integers by a forget gate without losing a bit.

A forget gate is a fraction `z / 1024` with an integer `1 <= z <= 1023`. Multiplying a state by it
destroys `log2(1024 / z)` bits. They are kept in a buffer `b` per unit, used as a stack in a mixed
radix:

    multiply:  (b, d) = divmod(b, z);  (h, u) = divmod(h * z + d, 1024);  b = b * 1024 + u
    divide:    (b, u) = divmod(b, 1024);  (h, d) = divmod(h * 1024 + u, z);  b = b * z + d

The two are exact inverses for any integers. The new state differs from `h * z / 1024` by less than
one unit in the last place. (MacKay et al., 2018, section 3.1, push the low 10 bits of `h` before
they pop `d`, which replaces ten bits of the state by noise; popping first keeps the error at one.)

`b` must not grow without bound, so full 16-bit words move from it to a word stream, in the manner
of range asymmetric numeral systems (Duda, 2014, arXiv 1311.2540). With `2^15 <= b < 2^31`,

    emit a word before multiply    if and only if   b >= z * 2^21,
    take it back after divide      if and only if   b <  2^15,

is unambiguous: without a word, `b // z * 1024` stays inside the interval; with one, `b` falls below
2^15 before the multiplication and no other way. (2^15 is a multiple of 1024, hence both bounds are
exact.) So nothing records where words were emitted, and `b` fits int32 for every sequence of gates.

A `b` need not belong to one unit. Several units can take turns with it, last in, first out: the
units of a step, in memory order, share `lanes` of them. Each `b` is 32 bits that do not shrink with
the sequence, so few lanes matter for short ones; many lanes are what vector instructions want.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

GATE_BITS = 10
"""Fractional bits of a forget gate."""

GATE_ONE = 1 << GATE_BITS
"""The integer that stands for a gate of 1; gates are integers in 1..GATE_ONE - 1."""

WORD_BITS = 16

_BLOCK_WORDS = 1 << 15

LOWEST = 1 << 15
"""A state that holds nothing."""

HIGHEST = (1 << 31) - 1
"""The largest state: none of the gates brings it below `LOWEST` in `divide_`."""

_LOWEST = float(LOWEST)
_WORD = float(1 << WORD_BITS)
_SIGN = 1 << (WORD_BITS - 1)  # words are unsigned, int16 is not: stored shifted by 2^15
_EMIT = float(1 << 21)
_GATE = float(GATE_ONE)


class Words(Protocol):
    """The words of a pass, as a sweep sees them."""

    def __len__(self) -> int: ...

    def pack(self) -> Tensor:
        """All that is needed to take the words back, 1-dimensional, int16."""

    def reserve(self, steps: int, certain: bool = False) -> None:
        """Make room for `steps` steps at once; `certain`: for all that they could forget."""

    def overflowed(self) -> bool:
        """Whether words were lost for lack of room. The pass must be repeated with more."""


class WordStream:
    """A stack of 16-bit words, packed densely as int16.

    Words are pushed in small batches and popped in batches of any size. They are kept in blocks, so
    that neither end of a pass ever needs a second copy of all of them.

    Args:
        packed: the words to start from, shape (words,), int16; empty by default.
        device: where an empty stream lives.
    """

    def __init__(self, packed: Tensor | None = None, device: torch.device | None = None) -> None:
        if packed is None:
            packed = torch.empty(0, dtype=torch.int16, device=device)
        self._blocks = [packed]
        self._below = 0
        """Words in all blocks but the last."""
        self._size = packed.numel()
        """Words in the last block, from its start."""
        self._pending: list[Tensor] = []
        self._pending_words = 0

    def __len__(self) -> int:
        return self._below + self._size + self._pending_words

    def push(self, words: Tensor) -> None:
        """Append words, shape (count,): int16, or float64 integers in 0..65535."""
        if words.dtype != torch.int16:
            words = (words - _SIGN).to(torch.int16)
        self._pending.append(words)
        self._pending_words += words.numel()
        if self._pending_words >= _BLOCK_WORDS:
            self._add_block()

    def pop(self, count: int) -> Tensor:
        """Take the last `count` words off, in the order in which they were pushed, as float64.

        Raises:
            IndexError: if fewer are left.
        """
        words = self.top(count)
        if count > len(words):
            raise IndexError(f"the word stream holds {len(words)} words, {count} were asked for")
        words = words[len(words) - count :].double().add_(_SIGN)
        self.drop(count)
        return words

    def top(self, count: int) -> Tensor:
        """At least the last `count` words, or all, contiguous, int16: 0 is stored as -32768."""
        if self._pending:
            self._add_block()
        while self._size < count and self._below:
            last = self._blocks.pop()[: self._size]
            self._below -= len(self._blocks[-1])
            self._blocks[-1] = torch.cat([self._blocks[-1], last])
            self._size = len(self._blocks[-1])
        return self._blocks[-1][: self._size]

    def drop(self, count: int) -> None:
        """Take the last `count` words off, at most as many as `top` returned."""
        self._size -= count
        while not self._size and self._below:
            self._blocks.pop()
            self._size = len(self._blocks[-1])
            self._below -= self._size

    def pack(self) -> Tensor:
        """The words, shape (len(self),), int16, in a tensor of exactly that size."""
        if self._below or self._pending or self._size != self._blocks[-1].numel():
            self._blocks[-1] = self._blocks[-1][: self._size]
            self._blocks = [torch.cat([*self._blocks, *self._pending])]
            self._below, self._size = 0, self._blocks[0].numel()
            self._pending, self._pending_words = [], 0
        return self._blocks[0]

    def _add_block(self) -> None:
        """Make a block of what was pushed last."""
        if self._size:
            if self._size < self._blocks[-1].numel():
                self._blocks[-1] = self._blocks[-1][: self._size].clone()
            self._below += self._size
        else:
            self._blocks.pop()
        self._blocks.append(torch.cat(self._pending))
        self._size = self._pending_words
        self._pending, self._pending_words = [], 0

    def reserve(self, steps: int, certain: bool = False) -> None:
        """Does nothing: the stream grows with what is pushed."""

    def overflowed(self) -> bool:
        """Never."""
        return False


class InformationBuffer:
    """The buffer of a block of units; several of them may share a word stream.

    Args:
        state: `b` of each lane as float64 integers in 2^15..2^31 - 1, any shape, contiguous. Unit i
            of a step, in memory order, uses lane i modulo their number. Modified in place.
        words: where full words go; None drops them, for passes that are never reversed.
    """

    gate_one: float = GATE_ONE
    """What stands for a gate of 1 in `multiply_` and `divide_`. A unit with it is left alone."""

    fused = False
    """Whether the cell's kernels work on `state` themselves, shape (batch, units)."""

    kept_units = 0
    """How many of the first units of h such kernels leave out of their count of gates."""

    def __init__(self, state: Tensor, words: WordStream | None) -> None:
        self.state = state
        self.words = words

    @staticmethod
    def initial_state(*shape: int, device: torch.device | None = None) -> Tensor:
        """The state of buffers that hold nothing, float64."""
        return torch.full(shape, _LOWEST, dtype=torch.float64, device=device)

    def _turns(self, h: Tensor, gate: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Lanes, states and gates of the units that use different lanes, as flat views."""
        lanes = self.state.view(-1)
        size = len(lanes) or 1
        parts = zip(torch.split(h.view(-1), size), torch.split(gate.reshape(-1), size), strict=True)
        return [(lanes[: len(part)], part, gates) for part, gates in parts]

    def multiply_(self, h: Tensor, gate: Tensor) -> None:
        """Replace `h` by `h * gate / 1024`, and keep what the rounding loses.

        Args:
            h: float64 integers below 2^31 in magnitude, shape (rows, units), contiguous.
            gate: float64 integers in 1..1024, shape (rows, units).
        """
        for b, part, gates in self._turns(h, gate):
            full = (b >= gates * _EMIT).nonzero().squeeze(1)
            if full.numel():
                value = b.index_select(0, full)
                rest = (value * (1.0 / _WORD)).floor_()
                if self.words is not None:
                    self.words.push(value.sub_(rest, alpha=_WORD))
                b.index_copy_(0, full, rest)
            # A correctly rounded float64 quotient of integers below 2^41 by one up to 2^10 has the
            # right floor: the true quotient is an integer or at least 2^-10 away from the next one.
            quotient = (b / gates).floor_()
            product = torch.addcmul(b, quotient, gates, value=-1).addcmul_(part, gates)
            torch.floor(product * (1.0 / _GATE), out=part)
            torch.add(product, quotient.sub_(part), alpha=_GATE, out=b)

    def divide_(self, h: Tensor, gate: Tensor) -> None:
        """Undo `multiply_` with the same gates: arguments as there."""
        for b, part, gates in reversed(self._turns(h, gate)):
            quotient = (b * (1.0 / _GATE)).floor_()
            product = torch.add(b, part - quotient, alpha=_GATE)
            torch.div(product, gates, out=part)
            part.floor_()
            torch.addcmul(product, quotient.sub_(part), gates, out=b)
            low = (b < _LOWEST).nonzero().squeeze(1)
            if low.numel():
                if self.words is None:
                    raise IndexError("this buffer dropped its words and cannot be reversed")
                high = b.index_select(0, low).mul_(_WORD)
                b.index_copy_(0, low, high.add_(self.words.pop(low.numel())))

    def is_initial(self) -> bool:
        """Whether the state is that of buffers which hold nothing."""
        return bool((self.state == _LOWEST).all())

    @property
    def gate_counts(self) -> Tensor | None:
        """How often each gate multiplied, shape (1025,), where `multiply_` counts; it does not."""
        return None

    def checksum(self) -> Tensor:
        """NaN if a state would be NaN and integers cannot show it, else 0: a scalar, float64."""
        return self.state.new_zeros((), dtype=torch.float64)


class Storage:
    """How a sweep keeps the integers of a pass."""

    integers: torch.dtype = torch.float64
    """Dtype of states and buffers: any that holds the integers exactly."""

    lanes: int | None = None
    """At most so many buffer states per half; None: one for each unit."""

    def words(self, batch: int, device: torch.device, packed: Tensor | None = None) -> Words:
        """Where the buffers of `batch` sequences put their words; `packed`: those to start from."""
        return WordStream(packed, device)

    def empty_buffers(self, batch: int, units: int, device: torch.device) -> Tensor:
        """Buffer states that hold nothing, for `units` units of a half: float64, (2, ...)."""
        shape = (batch, units) if self.lanes is None else (min(self.lanes, batch * units),)
        return InformationBuffer.initial_state(2, *shape, device=device)

    def buffers(self, states: list[Tensor], words: Any) -> list[InformationBuffer]:
        """The buffers of both halves.

        Args:
            states: those of each half, in the shape of `empty_buffers` and the dtype `integers`.
            words: what `words` returned, or None to drop words.
        """
        return [InformationBuffer(state, words) for state in states]


def information_bits(gate_counts: Tensor) -> float:
    """What multiplying by these gates forgets, in bits: the sum of log2(1024 / z).

    Args:
        gate_counts: how often each gate z occurred, shape (1025,), integers.
    """
    counts = gate_counts.to(device="cpu", dtype=torch.float64)[1:]
    gates = torch.arange(1, GATE_ONE + 1, dtype=torch.float64)
    return float((counts * (GATE_BITS - gates.log2())).sum())


def stored_bits(words: int, states: int) -> int:
    """What a word stream and so many buffer states occupy, in bits."""
    return WORD_BITS * words + 32 * states


def lowest_gate(max_forget_bits: float | None) -> int:
    """The smallest gate z that forgets at most `max_forget_bits` per step (None: unlimited)."""
    if max_forget_bits is None:
        return 1
    limit: float = GATE_ONE * 2.0**-max_forget_bits
    return min(GATE_ONE - 1, max(1, math.ceil(limit)))
