"""Sweeping a cell over chunks of time: forward, undone, differentiated. No autograd in here.

Reversal is chaotic: a gate that differs by one unit in the last place is garbage 20 steps later.
Hence `undo_chunk` forms each projection and each gate by the same call as `forward_chunk`, on
operands of the same shape, dtype and memory layout.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_revflip.reversible.buffer import GATE_ONE, Words
from lightning_revflip.reversible.cells import Cell, Undone
from lightning_revflip.reversible.errors import ReversalError
from lightning_revflip.reversible.layer_tensors import Gradients, LayerTensors
from lightning_revflip.reversible.perturbation import RecurrentPerturbation
from lightning_revflip.reversible.products import Products
from lightning_revflip.reversible.recurrent_weights import PerturbedHalfWeights, half_weights
from lightning_revflip.reversible.schedule import Chunk, Schedule
from lightning_revflip.reversible.slices import Slices


class SweepState:
    """States and information buffers of a batch: what a sweep moves forward and back.

    Args:
        cell: the cell they belong to.
        halves: integers of either half, each (batch, states * half), as `cell.storage` keeps them.
        buffers: buffer states of either half; none without forgetting.
        words: the words of both; None for a pass that is never reversed.
    """

    def __init__(
        self, cell: Cell[Any], halves: list[Tensor], buffers: list[Tensor], words: Words | None
    ) -> None:
        self.cell = cell
        self.halves = halves
        self.buffers = cell.storage.buffers(buffers, words)
        self.words = words

    @classmethod
    def initial(
        cls, cell: Cell[Any], batch: int, given: list[Tensor], device: torch.device, store: bool
    ) -> "SweepState":
        """The state before the first step, from h (and c), each (batch, hidden_size), or zero."""
        width = cell.states * cell.half
        if given:
            fixed = [cell.fixed_point.from_float(state) for state in reversed(given)]
            pairs = [state.chunk(2, dim=1) for state in fixed]
            halves = [torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True)]
        else:
            halves = list(torch.zeros(2, batch, width, dtype=torch.float64, device=device))
        return cls.resumed(cell, torch.stack(halves), store)

    @classmethod
    def resumed(cls, cell: Cell[Any], halves: Tensor, store: bool) -> "SweepState":
        """Given states, integers of shape (2, batch, states * half), and empty buffers."""
        batch, width = halves.shape[1:]
        units, device = width if cell.forgets else 0, halves.device
        buffers = cell.storage.empty_buffers(batch, units, device)
        words = cell.storage.words(batch, device) if store else None
        return cls._kept(cell, halves, buffers, words)

    @classmethod
    def from_compact(
        cls, cell: Cell[Any], halves: Tensor, buffers: Tensor, words: Tensor
    ) -> "SweepState":
        """The state that `compact` describes."""
        kept_words = cell.storage.words(halves.shape[1], halves.device, words)
        return cls._kept(cell, halves, buffers, kept_words)

    @classmethod
    def _kept(
        cls, cell: Cell[Any], halves: Tensor, buffers: Tensor, words: Words | None
    ) -> "SweepState":
        """Copies of the integers in the cell's own dtype: a sweep works in place."""
        dtype = cell.storage.integers
        return cls(
            cell, list(halves.to(dtype, copy=True)), list(buffers.to(dtype, copy=True)), words
        )

    def compact(self) -> tuple[Tensor, Tensor, Tensor]:
        """int32 states, int32 buffers and int16 words: all that a backward sweep starts from."""
        assert self.words is not None
        buffers = torch.stack([buffer.state for buffer in self.buffers])
        return torch.stack(self.halves).int(), buffers.int(), self.words.pack()

    def reserve(self, steps: int, certain: bool = False) -> None:
        """Make room for the words of a forward sweep of `steps` steps, where room must be made.

        Args:
            steps: of the longest sequence.
            certain: for all that the gates could forget, where the usual may be less.
        """
        if self.words is not None:
            self.words.reserve(steps, certain)

    def overflowed(self) -> bool:
        """Whether words were lost; then repeat the sweep after `reserve(steps, certain=True)`."""
        return self.words is not None and self.words.overflowed()

    @property
    def gate_counts(self) -> Tensor | None:
        """How often each forget gate occurred, shape (1025,), for a cell that counts by itself."""
        return self.buffers[0].gate_counts

    def checksums(self) -> list[Tensor]:
        """Scalars, one of them NaN or infinite if a state or a gate was."""
        sums = [half.sum(dtype=torch.float64) for half in self.halves]
        return sums + [buffer.checksum() for buffer in self.buffers]

    def outputs(self, dtype: torch.dtype) -> list[Tensor]:
        """The h of either half as floats, each (batch, half)."""
        return [self.cell.output(half, dtype) for half in self.halves]

    def floats(self, dtype: torch.dtype) -> list[Tensor]:
        """The h (and c) as floats, each (batch, hidden_size)."""
        parts = [half.chunk(self.cell.states, dim=1) for half in self.halves]
        states = [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]
        return [self.cell.fixed_point.to_float(state, dtype) for state in reversed(states)]

    def check_is(self, initial: "SweepState") -> None:
        """Raise unless this is the state that a forward sweep started from.

        Raises:
            ReversalError: saying what differs.
        """
        pairs = zip(self.halves, initial.halves, strict=True)
        wrong = sum(int((half != start).sum()) for half, start in pairs)
        if wrong:
            total = sum(half.numel() for half in self.halves)
            raise ReversalError(f"{wrong} of {total} recovered numbers differ from the given ones")
        if self.words or not all(buffer.is_initial() for buffer in self.buffers):
            raise ReversalError("the states agree, but the information buffer is not empty")


class HalfStep(NamedTuple):
    """A half-step that was undone, kept until it is differentiated."""

    gates: Any
    undone: Undone
    other: Tensor


@dataclass
class LayerSweep:
    """One layer and direction: cell, weights and settings of a pass.

    Args:
        cell: settings of the cell.
        schedule: the steps.
        products: how to multiply.
        weight_ih: (gate_rows, input_size), like all weights in the dtype of `products`.
        weight_hh: (gate_rows, half).
        bias: (gate_rows,) or None.
        perturbation: of weight_hh, with signs, or None.
        slices: units that are kept instead of what they forget, or None.
    """

    cell: Cell[Any]
    schedule: Schedule
    products: Products
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    perturbation: RecurrentPerturbation | None = None
    slices: Slices | None = None
    gate_counts: Tensor = field(init=False)
    """How often each forget gate k/1024 occurred, shape (1025,), int64."""

    def __post_init__(self) -> None:
        self.gate_counts = torch.zeros(
            GATE_ONE + 1, dtype=torch.int64, device=self.weight_hh.device
        )
        sizes = [blocks * self.cell.half for blocks in self.cell.recurrent_blocks]
        self._hh = half_weights(self.weight_hh, self.perturbation, sizes, self.products, self.dtype)
        # Not finite as soon as one of the numbers in it is not.
        self._checksum = self.weight_hh.sum(dtype=torch.float64)
        if self.perturbation is not None:
            self._checksum += self.perturbation.delta.sum(dtype=torch.float64)

    @classmethod
    def of(
        cls, cell: Cell[Any], schedule: Schedule, products: Products, tensors: LayerTensors
    ) -> "LayerSweep":
        """With tensors as the caller has them, of any dtype.

        Args:
            cell: settings of the cell.
            schedule: the steps.
            products: how to multiply.
            tensors: the weights, and the perturbation if there is one.
        """
        weight_ih, weight_hh, bias, delta, signs_in, signs_out = tensors
        assert weight_ih is not None
        assert weight_hh is not None
        dtype = products.dtype
        return cls(
            cell,
            schedule,
            products,
            weight_ih.to(dtype),
            weight_hh.to(dtype),
            None if bias is None else bias.to(dtype),
            None if delta is None else RecurrentPerturbation(delta.to(dtype), signs_in, signs_out),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of element-wise work, states and accumulated gradients: at least float32."""
        return torch.promote_types(self.weight_ih.dtype, torch.float32)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Both halves' share of weight_ih x + bias, views of shape (chunk rows, gates * half)."""
        return self.products.linear(x, self.weight_ih, self.dtype, self.bias).chunk(2, dim=1)

    def forward_chunk(self, chunk: Chunk, x: Tensor, state: SweepState, out: Tensor) -> None:
        """Advance `state` over a chunk.

        Args:
            chunk: the steps.
            x: its inputs, shape (chunk rows, input_size).
            state: modified in place.
            out: receives h after every step, shape (chunk rows, hidden_size).
        """
        cell, projected = self.cell, self._project(x)
        for half_projected in projected:
            self._checksum += half_projected.sum(dtype=torch.float64)
        outputs = state.outputs(self.dtype)
        forget_gates = []
        for step in chunk.steps:
            rows = step.stop - step.start
            for half in (0, 1):
                other = outputs[1 - half][:rows]
                gates = cell.activate(projected[half][step], other, self._hh[half])
                alive = state.halves[half][:rows]
                buffer = state.buffers[half]
                if self.slices is not None:
                    buffer = self.slices.forward_buffer(buffer, half)
                new_h = cell.advance(alive, gates, buffer, self.dtype)
                if self.slices is not None:
                    self.slices.keep(chunk.start + step.start, half, alive, buffer)
                outputs[half] = _replace_rows(outputs[half], new_h)
                out[step, half * cell.half : (half + 1) * cell.half] = outputs[half][:rows]
                integer = cell.forget_gates(gates)
                if integer is not None and self.slices is not None:
                    integer = self.slices.forgetting(integer, half)
                if integer is not None:
                    forget_gates.append(integer.to(torch.int16).view(-1))
        if forget_gates:
            # A NaN, which `is_finite` reports in the end, must not stop the count.
            counted = torch.cat(forget_gates).clamp_(0, GATE_ONE)
            self.gate_counts += torch.bincount(counted, minlength=GATE_ONE + 1)

    def leave(self, state: SweepState) -> None:
        """Take over the statistics of a state that the forward sweep goes on without."""
        for total in state.checksums():
            self._checksum += total
        if state.gate_counts is not None:
            self.gate_counts += state.gate_counts

    def is_finite(self, state: SweepState) -> bool:
        """Whether all inputs and gates of the forward sweep so far were finite numbers."""
        sums = [self._checksum, *state.checksums()]
        return bool(torch.stack(sums).isfinite().all())

    def undo_chunk(
        self, chunk: Chunk, x: Tensor, state: SweepState, out: Tensor | None = None
    ) -> list[tuple[HalfStep, HalfStep]]:
        """Move `state` back over a chunk.

        Args:
            chunk: the steps.
            x: as in `forward_chunk`.
            state: modified in place.
            out: receives what `forward_chunk` wrote there, if given.

        Returns:
            The steps in processing order, for `differentiate_chunk`.

        Raises:
            ReversalError: if the information buffer runs empty.
        """
        try:
            return self._undo_chunk(chunk, x, state, out)
        except IndexError as error:
            raise ReversalError("the information buffer ran empty") from error

    def _undo_chunk(
        self, chunk: Chunk, x: Tensor, state: SweepState, out: Tensor | None
    ) -> list[tuple[HalfStep, HalfStep]]:
        cell, projected = self.cell, self._project(x)
        outputs = state.outputs(self.dtype)
        steps = []
        for step in reversed(chunk.steps):
            rows = step.stop - step.start
            if out is not None:
                for part, half_out in zip(out[step].chunk(2, dim=1), outputs, strict=True):
                    part.copy_(half_out[:rows])
            pair: dict[int, HalfStep] = {}
            for half in (1, 0):
                other = outputs[1 - half][:rows]
                gates = cell.activate(projected[half][step], other, self._hh[half])
                alive = state.halves[half][:rows]
                buffer, first = state.buffers[half], chunk.start + step.start
                if self.slices is not None:
                    buffer = self.slices.reverse_buffer(buffer, first, half, rows)
                undone = cell.reverse_(alive, gates, buffer, self.dtype)
                if self.slices is not None:
                    self.slices.put_back(first, half, alive, undone, buffer)
                outputs[half] = _replace_rows(outputs[half], undone.h)
                pair[half] = HalfStep(gates, undone, other)
            steps.append((pair[0], pair[1]))
        return steps[::-1]

    def differentiate_chunk(
        self,
        chunk: Chunk,
        x: Tensor,
        steps: list[tuple[HalfStep, HalfStep]],
        grad_out: Tensor | None,
        grads: Gradients,
    ) -> Tensor:
        """Back-propagate through a chunk that was undone.

        Args:
            chunk: the steps.
            x: as in `forward_chunk`.
            steps: what `undo_chunk` returned; emptied, to free memory early.
            grad_out: gradient of `out`, shape (chunk rows, hidden_size), or None for zero.
            grads: accumulated into.

        Returns:
            Gradient of `x`, shape (chunk rows, input_size).
        """
        cell = self.cell
        grad_projected = torch.empty(
            len(chunk), cell.gate_rows, dtype=self.dtype, device=self.weight_hh.device
        )
        halves = grad_projected.chunk(2, dim=1)
        seen: list[list[tuple[Tensor, ...]]] = [[], []]
        for step in reversed(chunk.steps):
            rows = step.stop - step.start
            pair = steps.pop()
            if grad_out is not None:
                parts = grad_out[step].chunk(2, dim=1)
                for state_grads, part in zip(grads.states, parts, strict=True):
                    state_grads[0][:rows] += part
            for half in (1, 0):
                gates, undone, other = pair[half]
                new = [grad[:rows] for grad in grads.states[half]]
                out = halves[half][step]
                old, grad_other = cell.vjp(gates, undone, other, self._hh[half], new, out)
                grads.states[half] = [
                    _replace_rows(grad, part)
                    for grad, part in zip(grads.states[half], old, strict=True)
                ]
                grads.states[1 - half][0][:rows] += grad_other
                seen[half].append(cell.recurrent_inputs(gates, other))
        in_row_order = chunk.steps[::-1] if self.schedule.reverse else chunk.steps
        alive = [step.stop - step.start for step in in_row_order]
        for half, weights in enumerate(self._hh):
            seen_in_order = seen[half] if self.schedule.reverse else seen[half][::-1]
            inputs = [torch.cat(parts) for parts in zip(*seen_in_order, strict=True)]
            weights.accumulate(grads.weight_hh.chunk(2, dim=0)[half], halves[half], inputs)
            if grads.delta is not None and isinstance(weights, PerturbedHalfWeights):
                total = grads.delta.chunk(2, dim=0)[half]
                weights.accumulate_delta(total, halves[half], inputs, alive)
        self.products.accumulate(grads.weight_ih, grad_projected, x)
        if grads.bias is not None:
            grads.bias += grad_projected.sum(dim=0)
        return self.products.linear(grad_projected, self.weight_ih.t(), x.dtype)


def _replace_rows(full: Tensor, first: Tensor) -> Tensor:
    """`full` with its first rows replaced, without touching `full`."""
    return first if len(first) == len(full) else torch.cat([first, full[len(first) :]])
