"""RevGRU and RevLSTM on a CPU in float32, with their element-wise work in compiled C.

`cells.py` is the specification. Activations are views of the array that a matrix product filled,
and C gets the address of its first column; every other argument is dense.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.reversible.buffer import InformationBuffer, Storage
from lightning_revflip.reversible.cells import (
    ForgetGate,
    GRUGates,
    LSTMGates,
    Recurrent,
    RevGRUCell,
    RevLSTMCell,
    Undone,
)
from lightning_revflip.reversible.kernels.native import call


class NativeBuffer(InformationBuffer):
    """The buffer of a half; gates are float32, multiples of 1/1024."""

    gate_one = 1.0

    def multiply_(self, h: Tensor, gate: Tensor) -> None:
        words = gate.new_empty(gate.numel(), dtype=torch.int16)
        count = call("multiply", gate.numel(), self.state.numel(), h, self.state, gate, words)
        if count and self.words is not None:
            self.words.push(words[:count].clone())

    def divide_(self, h: Tensor, gate: Tensor) -> None:
        if self.words is None:
            raise IndexError("this buffer dropped its words and cannot be reversed")
        words = self.words.top(gate.numel())
        sizes = (gate.numel(), self.state.numel())
        count = call("divide", *sizes, h, self.state, gate, words, len(words))
        if count < 0:
            raise IndexError("the word stream holds fewer words than this step must take back")
        self.words.drop(count)


class NativeStorage(Storage):
    """How the compiled cells keep the integers of a pass."""

    lanes = 64  # fewer cannot hide the latency of a division

    def buffers(self, states: list[Tensor], words: Any) -> list[InformationBuffer]:
        return [NativeBuffer(state, words) for state in states]


def to_float(state: Tensor, first: int, half: int, one: float) -> Tensor:
    """The columns first..first + half of states as floats."""
    rows, width = state.shape
    out = state.new_empty(rows, half, dtype=torch.float32)
    call("to_float", rows, half, state, width, first, one, out)
    return out


class NativeGRUCell(RevGRUCell):
    """RevGRU in float32 on a CPU."""

    storage = NativeStorage()

    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> GRUGates:
        rows, half, stride = len(other), self.half, projected.stride(0)
        act = weight.linear(other, 0)
        gate, reset_other = other.new_empty(2, rows, half).unbind(0)
        call(
            *("gru_reset", rows, half, act, projected, stride, other),
            *(self.floor, self.lowest, gate, reset_other),
        )
        candidate = weight.linear(reset_other, 1)
        call("gru_candidate", rows, half, candidate, projected, stride)
        reset, sigmoid = act.chunk(2, dim=1)
        return GRUGates(reset, ForgetGate(sigmoid, gate), candidate, reset_other)

    def forward_(self, state: Tensor, gates: GRUGates, buffer: InformationBuffer) -> None:
        gate = gates.forget.value
        buffer.multiply_(state, gate)
        call("gru_add", gate.numel(), gate, gates.candidate, state, self.fixed_point.one)

    def reverse_(
        self, state: Tensor, gates: GRUGates, buffer: InformationBuffer, dtype: torch.dtype
    ) -> Undone:
        gate = gates.forget.value
        call("gru_add", gate.numel(), gate, gates.candidate, state, -self.fixed_point.one)
        buffer.divide_(state, gate)
        return Undone(self.output(state, dtype))

    def output(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return to_float(state, 0, self.half, self.fixed_point.one)

    def vjp(
        self,
        gates: GRUGates,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        rows, half, stride = len(other), self.half, out.stride(0)
        (grad,) = grads
        reset, (_, gate), candidate, _ = gates
        grad_g, grad_old, grad_other = other.new_empty(3, rows, half).unbind(0)
        call("gru_vjp_candidate", rows, half, gate, candidate, grad, grad_g, out, stride)
        grad_reset_other = weight.transposed(grad_g, 1)
        call(
            *("gru_vjp_gates", rows, half, reset, gate, candidate, undone.h, other, grad),
            *(grad_reset_other, self.slope, out, stride, grad_old, grad_other),
        )
        return [grad_old], grad_other.add_(weight.transposed(out[:, : 2 * half], 0))


class NativeLSTMCell(RevLSTMCell):
    """RevLSTM in float32 on a CPU."""

    storage = NativeStorage()

    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> LSTMGates:
        rows, half = len(other), self.half
        act = weight.linear(other, 0)
        gate = other.new_empty(rows, 2 * half)
        call(
            *("lstm_gates", rows, half, act, projected, projected.stride(0)),
            *(self.floor, self.lowest, gate),
        )
        sigmoids, f, o, g = torch.split(act, [2 * half, half, half, half], dim=1)
        return LSTMGates(ForgetGate(sigmoids, gate), f, o, g)

    def forward_(self, state: Tensor, gates: LSTMGates, buffer: InformationBuffer) -> None:
        assert gates.forget is not None
        buffer.multiply_(state, gates.forget.value)
        act = gates.forget.sigmoid
        call("lstm_add", len(state), self.half, act, state, self.fixed_point.one)

    def reverse_(
        self, state: Tensor, gates: LSTMGates, buffer: InformationBuffer, dtype: torch.dtype
    ) -> Undone:
        assert gates.forget is not None
        rows, half, one = len(state), self.half, self.fixed_point.one
        tanh_c = gates.output.new_empty(rows, half)
        call("lstm_subtract", rows, half, gates.forget.sigmoid, state, one, tanh_c)
        buffer.divide_(state, gates.forget.value)
        return Undone(self.output(state, dtype), to_float(state, 0, half, one), tanh_c)

    def output(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return to_float(state, self.half, self.half, self.fixed_point.one)

    def vjp(
        self,
        gates: LSTMGates,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        assert gates.forget is not None
        rows, half = len(other), self.half
        sigmoids, gate = gates.forget
        grad_old_h, grad_old_c = other.new_empty(2, rows, half).unbind(0)
        old_h, old_c, tanh_c = undone
        grad_h, grad_c = grads
        assert old_c is not None
        assert tanh_c is not None
        call(
            *("lstm_vjp", rows, half, sigmoids, gate, old_h, old_c, tanh_c, grad_h, grad_c),
            *(self.slope, out, out.stride(0), grad_old_h, grad_old_c),
        )
        return [grad_old_h, grad_old_c], weight.transposed(out, 0)
