"""Sweeping a stack of layers, with the modules below, between and above them, chunk by chunk.

Every layer has a front, a function of time steps that makes its input: the read-in for the first
layer, dropout or whatever stands between layers for the others. In a backward sweep a chunk is
undone layer by layer from the bottom, which restores the outputs of the top layer; the caller
turns these into their gradient; and the chunk is differentiated from the top. Nothing of the chunk
outlives it but gradients.

With segments, the forward sweep keeps the states at the start of each and no information buffer,
except for the last one. The backward sweep runs every other segment forward again before it undoes
it: memory O(sqrt(steps)) for one more forward pass (Chen et al., 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_revflip.reversible.cells import Cell
from lightning_revflip.reversible.errors import ReversalError
from lightning_revflip.reversible.layer_tensors import Gradients, LayerTensors
from lightning_revflip.reversible.layout import Layout
from lightning_revflip.reversible.products import Products
from lightning_revflip.reversible.replay import Replay
from lightning_revflip.reversible.schedule import Schedule
from lightning_revflip.reversible.slices import Slices
from lightning_revflip.reversible.sweep import HalfStep, LayerSweep, SweepState
from lightning_revflip.reversible.tables import InPlaceGradients

Front = Callable[..., Tensor]
"""Makes the input of a layer, in the user's layout; a module or a function without parameters."""


@dataclass(frozen=True)
class Autocast:
    """The autocast state in which the user's modules run, in whichever pass."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        """The present state."""
        kind = device.type
        return cls(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def restored(self) -> torch.autocast:
        """A context with this state."""
        return torch.autocast(self.device_type, self.dtype, self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class StackPlan:
    """What the passes over a stack are told besides tensors."""

    layout: Layout
    schedule: Schedule
    segment_chunks: int
    """Chunks in a segment; as many as there are, for a single segment."""
    cells: Sequence[Cell[Any]]
    products: Products
    fronts: Sequence[Front]
    replay: Replay
    autocast: Autocast
    sliced_units: int | None = None
    """Units of the top layer that are kept and returned; None for a read-out of any kind."""


@dataclass
class Leaf:
    """A tensor by which to differentiate, and its gradient so far."""

    tensor: Tensor
    total: Tensor
    used: bool = False
    """Whether anything was added."""

    @classmethod
    def of(cls, tensor: Tensor, total: Tensor | None = None) -> Leaf:
        """A leaf that shares memory with a tensor.

        Args:
            tensor: the tensor.
            total: what to add its gradient to; by default zeros, in at least float32.
        """
        if total is None:
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            total = torch.zeros_like(tensor, dtype=dtype)
        return cls(tensor.detach().requires_grad_(), total)


def differentiate(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Leaf]
) -> None:
    """Add the gradients of some outputs to the totals of the leaves."""
    used = [
        (y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad and g is not None
    ]
    if used and leaves:
        found = torch.autograd.grad(
            [y for y, _ in used],
            [leaf.tensor for leaf in leaves],
            [g.to(y.dtype) for y, g in used],
            allow_unused=True,
        )
        for leaf, grad in zip(leaves, found, strict=True):
            if grad is not None:
                leaf.total += grad
                leaf.used = True


def same(x: Tensor) -> Tensor:
    """The identity."""
    return x


class _Undone(NamedTuple):
    """One layer over a chunk that was undone and waits to be differentiated."""

    sources: list[Leaf]
    """Of what its front was called with, where a gradient is wanted."""
    x: Tensor
    """What its front returned, with its graph."""
    rows: Tensor
    """The same, as the layer saw it."""
    steps: list[tuple[HalfStep, HalfStep]]


class StackSweep:
    """The layers of a stack, ready to be swept.

    Args:
        plan: the settings.
        weights: of each layer.
        initial: h (and c) of each layer, (batch, hidden_size), or nothing for zero.
        inputs: what the first front is called with, in the layout of the plan.
        leaves: of the parameters of the modules.
        tables: makes gradients of large tables accumulate in place.
    """

    def __init__(
        self,
        plan: StackPlan,
        weights: Sequence[LayerTensors],
        initial: Sequence[Sequence[Tensor]],
        inputs: Sequence[Tensor],
        leaves: Sequence[Leaf],
        tables: InPlaceGradients,
    ) -> None:
        self.plan = plan
        self.inputs = inputs
        self._initial = initial
        self._leaves = leaves
        self._tables = tables
        self.layers = [
            LayerSweep.of(cell, plan.schedule, plan.products, tensors)
            for cell, tensors in zip(plan.cells, weights, strict=True)
        ]
        self._device = self.layers[0].weight_hh.device
        self.slices: Slices | None = None
        if plan.sliced_units is not None:
            sizes = plan.layout.batch_sizes
            self.slices = Slices(plan.cells[-1], plan.sliced_units, sizes, self._device)
            self.layers[-1].slices = self.slices
        self.chunks = plan.schedule.chunks()
        shape = (len(self.layers), len(self.chunks))
        self.sums = torch.zeros(shape, dtype=torch.float64, device=self._device)
        """Sums of what the fronts made in the forward sweep, shape (layers, chunks)."""

    # --- forward -----------------------------------------------------------------------------

    def forward(
        self, store: bool, visit: Callable[[int, Tensor], None] | None = None
    ) -> tuple[list[SweepState], list[list[Tensor]]]:
        """Sweep forward.

        Args:
            store: whether a backward sweep follows.
            visit: called with each chunk's number and the outputs of the top layer.

        Returns:
            The state of each layer after the last step; and, if stored, the int32 states of each
            layer before each segment but the first, [segment - 1][layer].
        """
        starts: list[list[Tensor]] = []
        states = self._initial_states(store and self._is_last(0))
        for segment in range(self.segments):
            if segment:
                for layer, state in zip(self.layers, states, strict=True):
                    layer.leave(state)
                halves = [torch.stack(state.halves).int() for state in states]
                states = self._resumed(halves, store and self._is_last(segment))
                if store:
                    starts.append(halves)
            self._reserve(states, segment)
            for number in self._numbers(segment):
                top = self._advance(number, states, self.sums)
                if visit is not None:
                    visit(number, top)
        return states, starts

    def is_finite(self, states: Sequence[SweepState]) -> bool:
        """Whether all numbers in the forward sweep were finite."""
        pairs = zip(self.layers, states, strict=True)
        return all(layer.is_finite(state) for layer, state in pairs)

    def steps(self, number: int) -> range:
        """The time steps of a chunk."""
        first = number * self.plan.schedule.chunk_steps
        return range(first, first + len(self.chunks[number].steps))

    def _advance(self, number: int, states: Sequence[SweepState], sums: Tensor) -> Tensor:
        chunk, below = self.chunks[number], None
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            sources = self._cut(self.inputs, number) if below is None else [below]
            with torch.no_grad():
                x = self._front(index, number, sources)
            rows = self.plan.layout.flat(x)
            sums[index, number] = rows.sum(dtype=torch.float64)
            below = rows.new_empty(len(chunk), layer.cell.hidden_size, dtype=layer.products.dtype)
            layer.forward_chunk(chunk, rows, state, below)
        assert below is not None
        return below

    def _front(self, index: int, number: int, sources: Sequence[Tensor]) -> Tensor:
        """The input of a layer in the user's layout, from the inputs or the rows below it."""
        plan, steps = self.plan, self.steps(number)
        if index > 0:
            sources = [plan.layout.unflat(rows, steps) for rows in sources]
        packed = plan.layout.packed_rows(steps, self._device)
        with plan.replay.at(number, index, packed=packed), plan.autocast.restored(), self._tables:
            x = plan.fronts[index](*sources)
        expected = (*plan.layout.shape(steps), self.layers[index].weight_ih.shape[1])
        if tuple(x.shape) != expected:
            name = "read_in" if index == 0 else f"between[{index - 1}]"
            raise ValueError(
                f"{name} must return the input of the recurrent layer above it for the time steps "
                f"it was given, a tensor of shape {expected}, got {tuple(x.shape)}."
            )
        dtype = plan.products.dtype
        if x.dtype != dtype and not plan.autocast.enabled:
            raise ValueError(
                f"the recurrent layer has weights of {dtype}, got an input of {x.dtype}. Convert "
                "one of them, or run under autocast."
            )
        return x

    def _cut(self, tensors: Sequence[Tensor], number: int) -> list[Tensor]:
        return [self.plan.layout.cut(tensor, self.steps(number)) for tensor in tensors]

    # --- backward ----------------------------------------------------------------------------

    def restore_slices(self, floats: Tensor) -> None:
        """Take back what `Slices.floats` returned after the forward sweep."""
        assert self.slices is not None
        self.slices.restore(floats, self._initial_states(False)[-1].halves)

    def backward(
        self,
        states: Sequence[SweepState],
        starts: Sequence[list[Tensor]],
        read_out: Callable[[int, Tensor], Tensor | None],
        grads: Sequence[Gradients],
        grad_inputs: Sequence[Tensor | None],
        grad_front: Tensor | None = None,
    ) -> None:
        """Sweep back.

        Args:
            states: of each layer after the last step.
            starts: as `forward` returned them.
            read_out: gets a chunk's number and the outputs of the top layer, (rows, hidden_size),
                and returns their gradient; None stands for zero.
            grads: of each layer, accumulated into.
            grad_inputs: receives the gradients of the inputs; None for those that need none.
            grad_front: gradient of what the first front returned, by others than the layer above
                it, (rows, features); None for zero.

        Raises:
            ReversalError: if the states at the start are not found again.
        """
        sums = torch.zeros_like(self.sums)
        for segment in reversed(range(self.segments)):
            numbers = self._numbers(segment)
            if not self._is_last(segment):
                states = self._states_before(segment, starts)
                self._reserve(states, segment)
                for number in numbers:
                    self._advance(number, states, sums)
            try:
                for number in reversed(numbers):
                    self._retreat(number, states, read_out, grads, grad_inputs, grad_front, sums)
                begun = self._states_before(segment, starts)
                for state, start in zip(states, begun, strict=True):
                    state.check_is(start)
                if self.slices is not None:
                    self.slices.check()
            except ReversalError as error:
                raise self._cause(sums, numbers) or error from error

    def _retreat(
        self,
        number: int,
        states: Sequence[SweepState],
        read_out: Callable[[int, Tensor], Tensor | None],
        grads: Sequence[Gradients],
        grad_inputs: Sequence[Tensor | None],
        grad_front: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Undo and differentiate a chunk."""
        chunk, layout, steps = self.chunks[number], self.plan.layout, self.steps(number)
        undone: list[_Undone] = []
        sources: list[Tensor | Leaf] = [
            tensor if grad is None else Leaf.of(tensor, layout.cut(grad, steps))
            for tensor, grad in zip(self._cut(self.inputs, number), grad_inputs, strict=True)
        ]
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            leaves = [source for source in sources if isinstance(source, Leaf)]
            given = [source.tensor if isinstance(source, Leaf) else source for source in sources]
            with torch.enable_grad():
                x = self._front(index, number, given)
            rows = layout.flat(x.detach())
            sums[index, number] = rows.sum(dtype=torch.float64)
            top = rows.new_empty(len(chunk), layer.cell.hidden_size, dtype=layer.products.dtype)
            undone.append(_Undone(leaves, x, rows, layer.undo_chunk(chunk, rows, state, top)))
            if index < len(self.layers) - 1:
                sources = [Leaf.of(top)]
        grad = read_out(number, top)
        for index in reversed(range(len(self.layers))):
            part = undone.pop()
            grad_rows = self.layers[index].differentiate_chunk(
                chunk, part.rows, part.steps, grad, grads[index]
            )
            if index == 0 and grad_front is not None:
                grad_rows = grad_rows + grad_front[layout.rows(steps)]
            grad_x = layout.unflat(grad_rows, steps)
            differentiate([part.x], [grad_x], [*part.sources, *self._leaves])
            grad = part.sources[0].total if index else None

    # --- segments and checks -----------------------------------------------------------------

    @property
    def segments(self) -> int:
        """Into how many parts the steps are divided."""
        return -(-len(self.chunks) // self.plan.segment_chunks)

    def _is_last(self, segment: int) -> bool:
        return segment == self.segments - 1

    def _numbers(self, segment: int) -> range:
        """The chunks of a segment."""
        size = self.plan.segment_chunks
        return range(segment * size, min(len(self.chunks), (segment + 1) * size))

    def _reserve(self, states: Sequence[SweepState], segment: int) -> None:
        """Room for all that a segment could forget: its steps are not to be repeated."""
        steps = sum(len(self.steps(number)) for number in self._numbers(segment))
        for state in states:
            state.reserve(steps, certain=True)

    def _initial_states(self, store: bool) -> list[SweepState]:
        return [
            SweepState.initial(cell, self.plan.layout.batch, list(given), self._device, store)
            for cell, given in zip(self.plan.cells, self._initial, strict=True)
        ]

    def _resumed(self, halves: Sequence[Tensor], store: bool) -> list[SweepState]:
        pairs = zip(self.plan.cells, halves, strict=True)
        return [SweepState.resumed(cell, both, store) for cell, both in pairs]

    def _states_before(self, segment: int, starts: Sequence[list[Tensor]]) -> list[SweepState]:
        return self._resumed(starts[segment - 1], True) if segment else self._initial_states(True)

    def _cause(self, sums: Tensor, numbers: range) -> ReversalError | None:
        """What went wrong, if a front made other numbers than in the forward sweep."""
        part = slice(numbers.start, numbers.stop)
        changed = (self.sums[:, part] != sums[:, part]).nonzero()
        if not len(changed):
            return None
        index, offset = changed[-1].tolist()
        steps = self.steps(numbers.start + offset)
        name = "read_in" if index == 0 else f"between[{index - 1}]"
        return ReversalError(
            f"{name} returned other numbers in the backward sweep than in the forward sweep for "
            f"the time steps {steps.start} to {steps.stop - 1}. Its randomness must come from "
            "torch's global generators (as in nn.Dropout) or from a SequenceNoise, and it must not "
            "change a state of its own"
        )
