"""The Triton kernels against the torch path, which is their specification.

They run on a GPU where there is one, else in Triton's interpreter, which takes some 20 ms per
program and half-step: sizes are small, and blocks smaller still, to have several programs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_revflip.reversible.buffer import InformationBuffer, WordStream
from lightning_revflip.reversible.cells import Cell, RevGRUCell, RevLSTMCell, Undone
from lightning_revflip.reversible.kernels import native
from lightning_revflip.reversible.sweep import SweepState
from tests.helpers.exact_arithmetic import ExactArithmetic
from tests.helpers.passes import normal
from tests.helpers.plain_buffer import plain_multiply
from tests.helpers.triton_kernels import Kernels, kernel_sigmoid, kernels_on_a_gpu_or_interpreted

pytest.importorskip("triton")

BLOCKS = (128, 256) if torch.cuda.is_available() else (16, 64)
"""A GPU's programs have several warps."""


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with kernels_on_a_gpu_or_interpreted() as found:
        yield found


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def new_buffer(kernels: Kernels, rows: int, half: int, states: int, block: int) -> Any:
    """A device buffer with stacks of its own, as half 0 of a pass with unlimited gates."""
    storage = kernels.device_buffer.DeviceStorage(half, states, None, block)
    initial = InformationBuffer.initial_state(2, rows, states * half).int().to(kernels.device)
    return storage.buffers(list(initial), storage.words(rows, kernels.device))[0]


def reference_buffer(rows: int, units: int) -> InformationBuffer:
    return InformationBuffer(InformationBuffer.initial_state(rows, units), WordStream())


def words_of(buffer: Any) -> Tensor:
    """The words on the stacks of a pass, as integers, in rising order."""
    packed = buffer.stacks.pack().cpu()
    words = packed[4 * buffer.stacks.programs :].int() & 0xFFFF
    assert len(words) == len(buffer.stacks)
    return words.sort().values


# --- the lossless multiplication -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "half", "states", "lowest"),
    [(1, 1, 1, 1), (2, 7, 2, 1), (5, 13, 1, 128), (3, 70, 1, 1), (4, 11, 2, 1000), (2, 33, 1, 512)],
)
def test_words_buffers_and_states_are_those_of_the_specification(
    kernels, rows, half, states, lowest
) -> None:
    units, block = states * half, BLOCKS[half > 16]
    plain = integers(-(2**31) + 1, 2**31, rows, units).double()
    plain[0, 0] = -(2.0**31) + 1
    state = plain.int().to(kernels.device)
    initial = state.clone()
    reference = reference_buffer(rows, units)
    buffer = new_buffer(kernels, rows, half, states, block)
    buffer.stacks.reserve(12, certain=True)
    gates = [integers(lowest, 1024, rows, units, seed=step).int() for step in range(12)]
    gates[3].fill_(1)
    gates[7].fill_(1023)
    for gate in gates:
        reference.multiply_(plain, gate.double())
        buffer.multiply_(state, gate.to(kernels.device))
        assert torch.equal(state.cpu().double(), plain)
        assert torch.equal(buffer.state.cpu().double(), reference.state)
    expected = (reference.words.pack().int() + 2**15).sort().values
    assert (len(expected) > 0) == (lowest < 1000)
    assert torch.equal(words_of(buffer), expected)
    for gate in reversed(gates):
        buffer.divide_(state, gate.to(kernels.device))
    assert torch.equal(state, initial)
    assert buffer.is_initial()
    assert not buffer.stacks


def test_sequences_that_have_ended_are_left_alone(kernels) -> None:
    sizes, half = [5, 5, 4, 2, 1, 1], 9
    state = integers(-(2**30), 2**30, sizes[0], half).int().to(kernels.device)
    initial, buffer = state.clone(), new_buffer(kernels, sizes[0], half, 1, BLOCKS[0])
    gates = [
        integers(1, 1024, rows, half, seed=step).int().to(kernels.device)
        for step, rows in enumerate(sizes)
    ]
    for gate in gates:
        ended = slice(len(gate), None)
        before = state[ended].clone(), buffer.state[ended].clone()
        buffer.multiply_(state[: len(gate)], gate)
        assert torch.equal(state[ended], before[0])
        assert torch.equal(buffer.state[ended], before[1])
    for gate in reversed(gates):
        buffer.divide_(state[: len(gate)], gate)
    assert torch.equal(state, initial)
    assert buffer.is_initial()
    assert not buffer.stacks


def test_a_full_stack_is_reported_and_nothing_is_written_beside_it(kernels) -> None:
    rows, half = 3, 9
    gates = [integers(1, 8, rows, half, seed=step).int().to(kernels.device) for step in range(8)]
    state = integers(-(2**30), 2**30, rows, half).int().to(kernels.device)
    initial, buffer = state.clone(), new_buffer(kernels, rows, half, 1, BLOCKS[0])
    stacks = buffer.stacks
    stacks.bits = 0.5
    stacks.reserve(len(gates))
    stacks.words.fill_(12345)
    for gate in gates:
        buffer.multiply_(state, gate)
    assert stacks.overflowed()
    other_half = stacks.programs * stacks.capacity
    assert (stacks.words[other_half:] == 12345).all()
    with pytest.raises(RuntimeError, match="certain=True"):
        stacks.pack()

    state, buffer = initial.clone(), new_buffer(kernels, rows, half, 1, BLOCKS[0])
    buffer.stacks.reserve(len(gates), certain=True)
    for gate in gates:
        buffer.multiply_(state, gate)
    assert not buffer.stacks.overflowed()
    for gate in reversed(gates):
        buffer.divide_(state, gate)
    assert torch.equal(state, initial)


def test_stacks_grow_on_the_way_and_keep_what_they_hold(kernels, monkeypatch) -> None:
    monkeypatch.setattr(kernels.device_buffer, "_FIRST_STEPS", 2)
    monkeypatch.setattr(kernels.device_buffer, "_USUAL_BITS", 10.0)
    state = integers(-(2**30), 2**30, 2, 9).int().to(kernels.device)
    initial, buffer = state.clone(), new_buffer(kernels, 2, 9, 1, BLOCKS[0])
    gates = [integers(1, 5, 2, 9, seed=step).int().to(kernels.device) for step in range(9)]
    capacities = set()
    for gate in gates:
        buffer.multiply_(state, gate)
        capacities.add(buffer.capacity)
    assert len(capacities) == 4
    for gate in reversed(gates):
        buffer.divide_(state, gate)
    assert torch.equal(state, initial)
    assert not buffer.stacks


@pytest.mark.parametrize("gate", [1, 3, 101, 129, 511, 901])
def test_no_unit_pushes_more_words_than_it_has_room_for(kernels, gate) -> None:
    """Even if the states are those that fill the buffer as fast as can be."""
    bits = kernels.device_buffer.forgotten_bits(10.0 - math.log2(gate))
    b, words = 2**15, list[int]()
    for step in range(3000):
        # The lowest bits that multiply appends are then all ones.
        rest = b >> 16 if b >= gate * 2**21 else b
        h = (1023 - rest % gate) * pow(gate, -1, 1024) % 1024
        b, _ = plain_multiply(b, h, gate, words)
        assert b % 1024 == 1023
        assert 16 * len(words) <= (step + 1) * bits
    assert len(words) > 5


def test_a_buffer_that_ran_empty_is_not_taken_for_a_reversed_one(kernels) -> None:
    buffer = new_buffer(kernels, 1, 4, 1, BLOCKS[0])
    assert not buffer.stacks
    gate = torch.full((1, 4), 512, dtype=torch.int32, device=kernels.device)
    buffer.divide_(torch.ones_like(gate), gate)
    assert buffer.stacks


# --- half-steps ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfStep:
    """Arguments of a half-step, on the CPU. Implements `cells.Recurrent` with given products."""

    projected: Tensor
    other: Tensor
    products: Sequence[Tensor]
    matrices: Sequence[Tensor]
    grads: Sequence[Tensor]

    @classmethod
    def random(cls, cell: Cell[Any], rows: int, seed: int) -> "HalfStep":
        """Some gates of the first row are as low and as high as they can be."""
        projected = 3.0 * normal(rows, cell.gates * cell.half, seed=seed)
        projected[0, ::5], projected[0, 1::5] = 200.0, -200.0
        widths = [blocks * cell.half for blocks in cell.recurrent_blocks]
        return cls(
            projected,
            normal(rows, cell.half, seed=seed + 1),
            normal(rows, sum(widths), seed=seed + 2).split(widths, 1),
            normal(sum(widths), cell.half, seed=seed + 3).split(widths),
            [normal(rows, cell.half, seed=seed + 4 + i) for i in range(cell.states)],
        )

    def linear(self, x: Tensor, block: int) -> Tensor:
        return self.products[block].clone().to(x.device)

    def transposed(self, grad: Tensor, block: int) -> Tensor:
        return (grad.cpu().double() @ self.matrices[block].double()).float().to(grad.device)


@dataclass
class Side:
    """One implementation, and where it has got to with half 0."""

    cell: Any
    device: torch.device
    state: SweepState

    def activate(self, step: HalfStep) -> Any:
        # In a sweep the projected input is a view of both halves'.
        rows, width = step.projected.shape
        projected = torch.zeros(rows, 2 * width, device=self.device)[:, width:]
        projected.copy_(step.projected)
        with ExactArithmetic(kernel_sigmoid):
            return self.cell.activate(projected, step.other.to(self.device), step)

    def advance(self, step: HalfStep) -> tuple[Tensor, Tensor | None]:
        """The new h, and the integer forget gates."""
        gates = self.activate(step)
        alive = self.state.halves[0][: len(step.other)]
        with ExactArithmetic(kernel_sigmoid):
            new_h = self.cell.advance(alive, gates, self.state.buffers[0], torch.float32)
        return new_h.cpu(), self.cell.forget_gates(gates)

    def reverse(self, step: HalfStep) -> tuple[Any, Undone]:
        gates = self.activate(step)
        alive = self.state.halves[0][: len(step.other)]
        with ExactArithmetic(kernel_sigmoid):
            undone = self.cell.reverse_(alive, gates, self.state.buffers[0], torch.float32)
        return gates, undone

    def vjp(self, step: HalfStep, gates: Any, undone: Undone) -> list[Tensor]:
        """Gradients of the projected input, of the other half, and of the old h (and c)."""
        rows, width = step.projected.shape
        both = torch.zeros(rows, 2 * width, device=self.device)
        grads = [grad.to(self.device) for grad in step.grads]
        other = step.other.to(self.device)
        old, grad_other = self.cell.vjp(gates, undone, other, step, grads, both[:, width:])
        assert not both[:, :width].any()
        return [both[:, width:].cpu(), grad_other.cpu(), *(grad.cpu() for grad in old)]

    def integers(self) -> Tensor:
        """States and buffers of half 0, float64."""
        both = self.state.halves[0], self.state.buffers[0].state
        return torch.stack(both).cpu().double()


def both_sides(
    kernels: Kernels, kind: Any, half: int, bits: float | None, rows: int
) -> tuple[Side, Side]:
    """The specification and the kernels, at the same initial state."""
    initial = [0.9 * normal(rows, 2 * half, seed=50 + i) for i in range(kind.states)]
    cpu, sides = torch.device("cpu"), []
    block = BLOCKS[half > 16]
    cells = (
        (kind(2 * half, bits), cpu),
        (kernels.cell(kind.name, 2 * half, bits, block), kernels.device),
    )
    for cell, device in cells:
        given = [state.to(device) for state in initial]
        sides.append(Side(cell, device, SweepState.initial(cell, rows, given, device, store=True)))
    return sides[0], sides[1]


half_steps = pytest.mark.parametrize(
    ("half", "sizes", "bits"),
    [(1, [1] * 6, 3.0), (9, [3, 3, 2, 2, 1], 3.0), (13, [2] * 4, None), (70, [2] * 3, 0.7)],
)


@half_steps
@pytest.mark.parametrize("kind", [RevGRUCell, RevLSTMCell])
def test_forward_half_steps_are_those_of_the_specification(
    kernels, kind, half, sizes, bits
) -> None:
    truth, device = both_sides(kernels, kind, half, bits, sizes[0])
    counts = torch.zeros(1025, dtype=torch.int64)
    for number, rows in enumerate(sizes):
        step = HalfStep.random(truth.cell, rows, seed=10 * number)
        (expected, gates), (found, uncounted) = truth.advance(step), device.advance(step)
        assert torch.equal(found, expected)
        assert torch.equal(device.integers(), truth.integers())
        assert gates is not None
        assert uncounted is None
        counts += torch.bincount(gates.long().flatten(), minlength=1025)
    assert torch.equal(device.state.gate_counts.cpu(), counts)
    if half > 1:
        assert counts[truth.cell.lowest] > 0
        assert counts[1023] > 0
    assert len(device.state.words) == len(truth.state.words)
    assert not device.state.overflowed()
    assert torch.stack(device.state.checksums()).isfinite().all()


@half_steps
@pytest.mark.parametrize("kind", [RevGRUCell, RevLSTMCell])
def test_reversed_half_steps_and_gradients_are_those_of_the_specification(
    kernels, kind, half, sizes, bits
) -> None:
    truth, device = both_sides(kernels, kind, half, bits, sizes[0])
    start = device.integers()
    steps = [HalfStep.random(truth.cell, rows, seed=10 * i) for i, rows in enumerate(sizes)]
    for step in steps:
        truth.advance(step)
        device.advance(step)
    for side in (truth, device):
        side.state = SweepState.from_compact(side.cell, *side.state.compact())
    for step in reversed(steps):
        (gates, expected), (products, found) = truth.reverse(step), device.reverse(step)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine.cpu(), theirs)
        other = step.other.to(device.device)
        for mine, theirs in zip(
            device.cell.recurrent_inputs(products, other),
            truth.cell.recurrent_inputs(gates, step.other),
            strict=True,
        ):
            assert torch.equal(mine.cpu(), theirs)
        assert torch.equal(device.integers(), truth.integers())
        for mine, theirs in zip(
            device.vjp(step, products, found), truth.vjp(step, gates, expected), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(device.integers(), start)
    assert not device.state.words


@pytest.mark.parametrize("kind", [RevGRUCell, RevLSTMCell])
def test_gradients_agree_with_finite_differences(kernels, kind) -> None:
    """Of the rounded half-step: gates are multiples of 1/1024, so differences are coarse."""
    half, rows, size = 4, 3, 0.25

    def loss(step: HalfStep, initial: Sequence[Tensor]) -> float:
        cell = kernels.cell(kind.name, 2 * half, 1.0, BLOCKS[0])
        given = [state.to(kernels.device) for state in initial]
        side = Side(
            cell, kernels.device, SweepState.initial(cell, rows, given, kernels.device, True)
        )
        side.advance(step)
        new = [state[:, :half].cpu().double() for state in side.state.floats(torch.float64)]
        return sum(float((grad * state).sum()) for grad, state in zip(step.grads, new, strict=True))

    cell = kind(2 * half, 1.0)
    step = HalfStep.random(cell, rows, seed=1)
    step.projected.clamp_(-2.0, 2.0)
    initial = [0.5 * normal(rows, 2 * half, seed=70 + i) for i in range(cell.states)]
    _, side = both_sides(kernels, kind, half, 1.0, rows)
    given = [state.to(kernels.device) for state in initial]
    side.state = SweepState.initial(side.cell, rows, given, kernels.device, True)
    side.advance(step)
    grad_projected, _, *grad_old = side.vjp(step, *side.reverse(step))

    direction = grad_projected / grad_projected.norm()
    ahead, behind = (
        loss(
            HalfStep(step.projected + sign * size * direction, *list(vars(step).values())[1:]),
            initial,
        )
        for sign in (1, -1)
    )
    expected = float(grad_projected.norm())
    assert (ahead - behind) / (2 * size) == pytest.approx(expected, rel=0.05)
    moved = [state.clone() for state in initial]
    for state, grad in zip(moved, grad_old, strict=True):
        state[:, :half] += size * grad
    change = loss(step, moved) - loss(step, initial)
    expected = size * sum(float((grad * grad).sum()) for grad in grad_old)
    assert change == pytest.approx(expected, rel=0.1)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN, by numpy
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [RevGRUCell, RevLSTMCell])
def test_gates_that_are_not_finite_are_noticed(kernels, kind, broken) -> None:
    for column in range(kind(6, 3.0).gates * 3):
        _, side = both_sides(kernels, kind, 3, 3.0, 2)
        step = HalfStep.random(kind(6, 3.0), 2, seed=0)
        step.projected[1, column] = broken
        if kind is RevGRUCell and column < 3:  # the product with r * other
            gates = side.activate(step)
            assert gates.reset_other[1, column].isnan()
            continue
        side.advance(step)
        assert torch.stack(side.state.checksums()).isnan().any()
        _, clean = both_sides(kernels, kind, 3, 3.0, 2)
        clean.advance(HalfStep.random(kind(6, 3.0), 2, seed=0))
        assert torch.stack(clean.state.checksums()).isfinite().all()


def test_the_sigmoid_of_these_tests_is_one_and_that_of_the_compiled_cells() -> None:
    x = torch.cat([torch.linspace(-100, 100, 20_001), torch.tensor([-torch.inf, torch.inf, 0.0])])
    assert (kernel_sigmoid(x).double() - x.double().sigmoid()).abs().max() < 1.2e-7
    if native.LIBRARY.available:
        assert torch.equal(kernel_sigmoid(x), native.sigmoid(x))
