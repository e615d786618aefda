"""The information buffer on a GPU: a stack of words per program, and no word to the host.

A program of a kernel owns a block of units and a region of memory, onto which it pushes the words
of its block; in-block prefix sums give each word its place. So programs need not wait for each
other, nor the host for them. The host knows how many steps were pushed, and from this how much
room they need at most; it enlarges the regions before they could overflow. Gates without a limit
could forget 10 bits per step and do not: there the regions are made for fewer, a kernel that finds
its region full raises a flag and drops the words, and at the end of the sequence, where the host
reads the flag, the pass is repeated with room for everything.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.reversible.buffer import (
    GATE_ONE,
    WORD_BITS,
    InformationBuffer,
    Storage,
    lowest_gate,
)
from lightning_revflip.reversible.kernels import triton as kernels
from lightning_revflip.reversible.kernels.triton import launch

_USUAL_BITS = 2.0
"""Room per unit and step where gates have no limit; untrained gates forget about 1 bit."""

_FIRST_STEPS = 64
"""Steps that get room at first, unless `reserve` says how many there are."""


def forgotten_bits(max_forget_bits: float | None) -> float:
    """How many bits a unit adds to the words per step at most.

    A step takes b to less than `(b / z + 1) * 1024`, and `b >= 32 * z` then, with or without a word
    taken from it: so log2(b) grows by less than `log2(1024 / z) + log2(33 / 32)`, and a word lowers
    it by at least 16. It is 15 at first and never less after a step.
    """
    return math.log2(GATE_ONE / lowest_gate(max_forget_bits) * 33.0 / 32.0)


class WordStacks:
    """The words of a batch: for either half, a stack per program.

    A dense copy (`pack`) starts with the heights of all stacks as int32, in pairs of int16.

    Args:
        units: of one half, rows * half.
        states: per unit.
        block: units of a program.
        max_forget_bits: limit of the gates.
        device: where the stacks live.
        packed: the dense copy to take words back from.
    """

    def __init__(
        self,
        units: int,
        states: int,
        block: int,
        max_forget_bits: float | None,
        device: torch.device,
        packed: Tensor | None = None,
    ) -> None:
        self.block = block
        self.programs = -(-units // block)
        self.states_per_program = states * min(units, block)
        self.certain_bits = forgotten_bits(max_forget_bits)
        self.bits = _USUAL_BITS if max_forget_bits is None else self.certain_bits
        self.capacity = 0
        """Words of one stack."""
        self.flags = torch.zeros(1, dtype=torch.int32, device=device)
        stacks = 2 * self.programs
        if packed is None:
            self.top = torch.zeros(stacks, dtype=torch.int32, device=device)
            self.words = torch.empty(0, dtype=torch.int16, device=device)
        else:
            self.top = packed[: 2 * stacks].clone().view(torch.int32)
            self.words = packed[2 * stacks :]
        self.start = self._dense_starts()
        self._pushed = [0, 0]
        self._reserved_steps = 0

    def reserve(self, steps: int, certain: bool = False) -> None:
        """Make room for the words of `steps` steps; `certain`: whatever their gates forget."""
        if certain:
            self.bits = self.certain_bits
        self._reserved_steps = max(steps, self._reserved_steps)
        bits = self._reserved_steps * self.states_per_program * self.bits
        capacity = math.ceil(bits / WORD_BITS)
        if capacity > self.capacity:
            grown = self.words.new_empty(2 * self.programs, capacity)
            grown[:, : self.capacity] = self.words.view(2 * self.programs, self.capacity)
            self.words, self.capacity = grown.view(-1), capacity
            self.start = torch.arange(2 * self.programs, device=grown.device) * capacity

    def count_steps(self, half: int, steps: int = 1) -> None:
        """Tell that so many steps of a half are about to push."""
        self._pushed[half] += steps
        if self._pushed[half] > self._reserved_steps:
            self.reserve(max(_FIRST_STEPS, self._pushed[half], 2 * self._reserved_steps))

    def part(self, half: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a kernel is told about the stacks of a half: words, start, top."""
        stacks = slice(half * self.programs, (half + 1) * self.programs)
        return self.words, self.start[stacks], self.top[stacks]

    def overflowed(self) -> bool:
        """Whether words were lost for lack of room. Waits for the device."""
        return bool(self.flags.item() & kernels.OVERFLOW.value)

    def __len__(self) -> int:
        """Words on all stacks. Waits for the device."""
        return int(self.top.sum().item())

    def __bool__(self) -> bool:
        """Whether a stack holds a word, or one was asked for a word that it did not hold."""
        return bool((self.top != 0).any() | (self.flags & kernels.EMPTY.value).bool().any())

    def pack(self) -> Tensor:
        """All words and the heights of the stacks, densely, int16. Waits for the device.

        Raises:
            RuntimeError: if words were lost.
        """
        if self.overflowed():
            raise RuntimeError(
                "a pass needed more room for the words of its information buffer than it had "
                "reserved; it must be repeated after reserve(steps, certain=True)."
            )
        header = self.top.view(torch.int16)
        starts = self._dense_starts()
        used, highest = (
            torch.stack([self.top.sum(), self.top.max()]).tolist() if len(starts) else (0, 0)
        )
        packed = header.new_empty(len(header) + used)
        packed[: len(header)] = header
        target = packed[len(header) :]
        # One axis: a GPU allows 65,535 programs along the others.
        blocks = -(-highest // self.block)
        grid = (2 * self.programs * blocks,)
        tensors = (self.words, self.start, self.top, target, starts)
        launch(kernels.pack, grid, self.block, *tensors, blocks=blocks)
        return packed

    def _dense_starts(self) -> Tensor:
        return self.top.cumsum(0) - self.top


class DeviceBuffer(InformationBuffer):
    """The buffers of a half, int32, in the form that kernels take.

    Args:
        state: `b` of each unit, shape (batch, states * half), int32. Modified in place.
        stacks: the words of both halves; None drops them, for passes that are never reversed.
        half: which half, 0 or 1.
        states: state vectors side by side in a row of `state`.
        block: units of a program.
        flags: what kernels report, shape (1,), int32.
        gate_counts: how often each forget gate occurred, shape (1025,), int64.
    """

    fused = True

    def __init__(
        self,
        state: Tensor,
        stacks: WordStacks | None,
        half: int,
        states: int,
        block: int,
        flags: Tensor,
        gate_counts: Tensor,
    ) -> None:
        super().__init__(state, None)
        self.stacks = stacks
        self.states = states
        self.block = block
        self.flags = flags
        self._gate_counts = gate_counts
        self._half = half

    @property
    def gate_counts(self) -> Tensor:
        return self._gate_counts

    def to_push(self) -> tuple[Tensor, ...]:
        """The arguments buffer, words, start, top, flags of a kernel that multiplies once."""
        if self.stacks is None:
            return (self.state, *[self.flags] * 4)  # never touched with STORE=False
        self.stacks.count_steps(self._half)
        return (self.state, *self.stacks.part(self._half), self.flags)

    def to_pop(self) -> tuple[Tensor, ...]:
        """The same of a kernel that divides once."""
        if self.stacks is None:
            raise IndexError("this buffer dropped its words and cannot be reversed")
        return (self.state, *self.stacks.part(self._half), self.flags)

    @property
    def capacity(self) -> int:
        """Words of a stack."""
        return 0 if self.stacks is None else self.stacks.capacity

    def multiply_(self, h: Tensor, gate: Tensor) -> None:
        """Replace `h` by `h * gate / 1024`: both int32, dense, shape (rows, states * half)."""
        pushed = self.to_push()
        numbers = {"capacity": self.capacity, "STORE": self.stacks is not None}
        self._launch(kernels.multiply, h, gate, *pushed, **numbers)

    def divide_(self, h: Tensor, gate: Tensor) -> None:
        """Undo `multiply_` with the same gates: arguments as there."""
        self._launch(kernels.divide, h, gate, *self.to_pop())

    def checksum(self) -> Tensor:
        """NaN if a gate was computed from NaN or infinity, else 0: a scalar, float64."""
        flagged = (self.flags[0] & kernels.NOT_FINITE.value) != 0
        return torch.where(flagged, torch.nan, 0.0).double()

    def _launch(self, kernel: Any, *tensors: Tensor, **numbers: Any) -> None:
        rows, width = tensors[0].shape
        half = width // self.states
        units = {"count": rows * half, "half": half, "STATES": self.states}
        grid = (-(-rows * half // self.block),)
        launch(kernel, grid, self.block, *tensors, **units, **numbers)


@dataclass(frozen=True)
class DeviceStorage(Storage):
    """How the Triton cells keep the integers of a pass.

    Args:
        half: units of a half.
        states: state vectors per half.
        max_forget_bits: limit of the gates.
        block: units of a program.
    """

    half: int
    states: int
    max_forget_bits: float | None
    block: int

    integers = torch.int32

    def words(self, batch: int, device: torch.device, packed: Tensor | None = None) -> WordStacks:
        units = batch * self.half
        return WordStacks(units, self.states, self.block, self.max_forget_bits, device, packed)

    def empty_buffers(self, batch: int, units: int, device: torch.device) -> Tensor:
        return InformationBuffer.initial_state(2, batch, units, device=device)

    def buffers(self, states: list[Tensor], words: WordStacks | None) -> list[InformationBuffer]:
        device = states[0].device
        flags = torch.zeros(1, dtype=torch.int32, device=device) if words is None else words.flags
        counts = torch.zeros(GATE_ONE + 1, dtype=torch.int64, device=device)
        return [
            DeviceBuffer(state, words, half, self.states, self.block, flags, counts)
            for half, state in enumerate(states)
        ]
