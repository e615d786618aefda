"""RevGRU and RevLSTM on a GPU, with their element-wise work in Triton kernels.

`cells.py` is the specification. Element-wise work is float32 whatever the dtype of the products,
integers are int32. `activate` does the matrix products, and the kernel that moves the state
computes the gates on the way: the forward kernel leaves nothing but the new state, the reverse
kernel writes the activations over the products, for `vjp`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_revflip.reversible.buffer import GATE_ONE
from lightning_revflip.reversible.cells import Cell, Recurrent, RevGRUCell, RevLSTMCell, Undone
from lightning_revflip.reversible.kernels import triton_gru, triton_lstm
from lightning_revflip.reversible.kernels.device_buffer import DeviceStorage
from lightning_revflip.reversible.kernels.triton import launch


class GRUProducts(NamedTuple):
    """Pre-activations of a RevGRU half-step without the input's share, until it is undone."""

    act: Tensor
    """r, and z without the input's share, (rows, 2 * half)."""
    candidate: Tensor
    projected: Tensor
    reset_other: Tensor


class LSTMProducts(NamedTuple):
    """Pre-activations of a RevLSTM half-step without the input's share, until it is undone."""

    act: Tensor
    """z, p, f, o, g, (rows, 5 * half)."""
    projected: Tensor


class TritonCell(Cell[Any]):
    """How the cells of this module keep a pass's integers, and launch kernels."""

    block: ClassVar[int] = 256
    """Units of a program; other numbers have not been compared."""

    @property
    def storage(self) -> DeviceStorage:
        return DeviceStorage(self.half, self.states, self.max_forget_bits, self.block)

    def forget_gates(self, gates: Any) -> Tensor | None:
        return None  # the forward kernel counts them in the buffer's `gate_counts`

    def forward_(self, state: Tensor, gates: Any, buffer: Any) -> None:
        self.advance(state, gates, buffer, torch.float32)

    @property
    def _gate(self) -> dict[str, Any]:
        """How kernels limit and round a forget gate."""
        scale, offset = GATE_ONE * self.slope, GATE_ONE * self.floor
        return {"scale": scale, "offset": offset, "lowest": self.lowest}

    def _launch(self, kernel: Any, rows: int, *tensors: Tensor, **numbers: Any) -> None:
        units = rows * self.half
        grid = (-(-units // self.block),)
        launch(kernel, grid, self.block, *tensors, count=units, half=self.half, **numbers)


class TritonGRUCell(TritonCell, RevGRUCell):
    """RevGRU on a GPU."""

    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> Any:
        act = weight.linear(other, 0)
        reset_other = torch.empty_like(other)
        self._launch(
            *(triton_gru.gru_reset, len(other), act, projected, other, reset_other),
            stride=projected.stride(0),
        )
        return GRUProducts(act, weight.linear(reset_other, 1), projected, reset_other)

    def advance(self, state: Tensor, gates: Any, buffer: Any, dtype: torch.dtype) -> Tensor:
        act, candidate, projected, _ = gates
        new_h = torch.empty_like(candidate)
        pushed = buffer.to_push()
        self._launch(
            *(triton_gru.gru_forward, len(state), act, candidate, projected, state),
            *(*pushed, buffer.gate_counts, new_h),
            stride=projected.stride(0),
            capacity=buffer.capacity,
            kept=buffer.kept_units,
            ONE=self.fixed_point.one,
            STORE=buffer.stacks is not None,
            **self._gate,
        )
        return new_h

    def reverse_(self, state: Tensor, gates: Any, buffer: Any, dtype: torch.dtype) -> Undone:
        act, candidate, projected, _ = gates
        old_h = torch.empty_like(candidate)
        self._launch(
            *(triton_gru.gru_reverse, len(state), act, candidate, projected, state),
            *(*buffer.to_pop(), old_h),
            stride=projected.stride(0),
            ONE=self.fixed_point.one,
            **self._gate,
        )
        return Undone(old_h)

    def vjp(
        self,
        gates: Any,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        rows = len(other)
        act, candidate, _, _ = gates
        (grad,) = grads
        grad_candidate, grad_old, grad_other = other.new_empty(3, rows, self.half).unbind(0)
        self._launch(
            *(triton_gru.gru_vjp_candidate, rows, act, candidate, grad, grad_candidate),
            **self._gate,
        )
        grad_reset_other = weight.transposed(grad_candidate, 1)
        self._launch(
            *(triton_gru.gru_vjp_gates, rows, act, candidate, undone.h, other, grad),
            *(grad_candidate, grad_reset_other, out, grad_old, grad_other),
            stride=out.stride(0),
            slope=self.slope,
            **self._gate,
        )
        return [grad_old], grad_other.add_(weight.transposed(out[:, : 2 * self.half], 0))


class TritonLSTMCell(TritonCell, RevLSTMCell):
    """RevLSTM on a GPU."""

    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> Any:
        return LSTMProducts(weight.linear(other, 0), projected)

    def advance(self, state: Tensor, gates: Any, buffer: Any, dtype: torch.dtype) -> Tensor:
        act, projected = gates
        new_h: Tensor = act.new_empty(len(state), self.half)
        pushed = buffer.to_push()
        self._launch(
            *(triton_lstm.lstm_forward, len(state), act, projected, state),
            *(*pushed, buffer.gate_counts, new_h),
            stride=projected.stride(0),
            capacity=buffer.capacity,
            kept=buffer.kept_units,
            ONE=self.fixed_point.one,
            STORE=buffer.stacks is not None,
            **self._gate,
        )
        return new_h

    def reverse_(self, state: Tensor, gates: Any, buffer: Any, dtype: torch.dtype) -> Undone:
        act, projected = gates
        old_h, old_c, tanh_c = act.new_empty(3, len(state), self.half).unbind(0)
        self._launch(
            *(triton_lstm.lstm_reverse, len(state), act, projected, state),
            *(*buffer.to_pop(), old_h, old_c, tanh_c),
            stride=projected.stride(0),
            ONE=self.fixed_point.one,
            **self._gate,
        )
        return Undone(old_h, old_c, tanh_c)

    def vjp(
        self,
        gates: Any,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        rows = len(other)
        grad_h, grad_c = grads
        assert undone.c is not None
        assert undone.tanh_c is not None
        grad_old_h, grad_old_c = other.new_empty(2, rows, self.half).unbind(0)
        self._launch(
            *(triton_lstm.lstm_vjp, rows, gates.act, undone.h, undone.c, undone.tanh_c),
            *(grad_h, grad_c, out, grad_old_h, grad_old_c),
            stride=out.stride(0),
            slope=self.slope,
            **self._gate,
        )
        return [grad_old_h, grad_old_c], weight.transposed(out, 0)
