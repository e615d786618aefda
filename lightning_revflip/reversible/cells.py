r"""Reversible GRU and LSTM cells: forward half-step, exact reverse, vector-Jacobian product.

The state is split into two halves, and each half is updated from the input and the other half
(MacKay, Vicol, Ba, Grosse, 2018, "Reversible Recurrent Neural Networks", arXiv 1810.10999). Half 1
sees the old half 2, half 2 sees the new half 1:

    RevGRU     z, r = gates(x, other);  g = tanh(x, r * other);   h <- z * h + (1 - z) * g
    RevLSTM    z, p, f, o, g = gates(x, other);                   c <- z * c + f * g
                                                                  h <- p * h + o * tanh(c)

`z` and `p` are forget gates: they multiply a state and so destroy bits, which the information
buffer keeps. They are limited to `max_forget_bits` per step, `z = a + (1 - a) * sigmoid(.)` with
`a = 2^-max_forget_bits`, and rounded to multiples of 1/1024. With `max_forget_bits=0` the
multiplication is left out (the paper's NF-RevGRU and NF-RevLSTM) and nothing is stored.

Gradients are straight-through at every rounding: they are the gradients of the real-valued
formulas above, evaluated at the rounded gates and the exactly reconstructed states.

Shapes: `rows` counts the sequences alive at a step, `half = hidden_size // 2`. States are float64
tensors of integers (see `fixed_point`), shape (rows, states * half), h last. Everything else is
float: gates, activations and gradients (rows, half) in float32 or float64, weights possibly lower.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_revflip.reversible.buffer import GATE_ONE, InformationBuffer, Storage, lowest_gate
from lightning_revflip.reversible.fixed_point import FixedPoint


class ForgetGate(NamedTuple):
    """A forget gate, limited and rounded, and the sigmoid that its gradient needs."""

    sigmoid: Tensor
    value: Tensor
    """What the state is multiplied by: a multiple of 1/1024, which floats hold exactly."""

    @property
    def integer(self) -> Tensor:
        """1024 * value, as float64."""
        return self.value.double() * GATE_ONE


class Undone(NamedTuple):
    """What reversing a half-step recovered, as floats of shape (rows, half)."""

    h: Tensor
    """The half's h before the step."""
    c: Tensor | None = None
    """RevLSTM: its c before the step."""
    tanh_c: Tensor | None = None
    """RevLSTM: tanh of its c after the step."""


Gates = TypeVar("Gates")
"""What a cell computes in a half-step before it touches the state."""


class Recurrent(Protocol):
    """The recurrent weights of a half-step, in blocks of rows that see the same input."""

    def linear(self, x: Tensor, block: int) -> Tensor:
        """`x @ weight[block].T`, shape (rows, rows of the block)."""

    def transposed(self, grad: Tensor, block: int) -> Tensor:
        """`grad @ weight[block]`, shape (rows, half)."""


class Cell(ABC, Generic[Gates]):
    """One reversible cell; holds settings only, weights and states are arguments.

    A half-step is `activate`, then `forward_`; it is undone by `activate` with the same arguments
    (bit for bit: the same chunk, dtype, device), then `reverse_`, then differentiated by `vjp`.

    Args:
        hidden_size: units of both halves together, even.
        max_forget_bits: how many bits a unit may forget per step; None: unlimited; 0: none.

    Raises:
        ValueError: for an odd `hidden_size` or negative or NaN `max_forget_bits`.
    """

    name: ClassVar[str]
    states: ClassVar[int]
    """State vectors per half: h, or c and h."""
    forget_blocks: ClassVar[tuple[int, ...]]
    """Which row blocks of a half are forget gates."""
    replay_floats: ClassVar[int]
    """Floats per hidden unit and step that a chunk holds between reversal and gradients."""

    def __init__(self, hidden_size: int, max_forget_bits: float | None) -> None:
        if hidden_size <= 0 or hidden_size % 2:
            advice = f" Use {hidden_size - 1} or {hidden_size + 1}." if hidden_size > 2 else ""
            raise ValueError(
                f"hidden_size must be positive and even for {self.name} (the state is split in "
                f"two halves), got {hidden_size}.{advice}"
            )
        number = isinstance(max_forget_bits, int | float) and not isinstance(max_forget_bits, bool)
        if max_forget_bits is not None and not (number and max_forget_bits >= 0):
            raise ValueError(
                "max_forget_bits must be a number >= 0, or None for no limit, "
                f"got {max_forget_bits!r}."
            )
        if max_forget_bits is not None and math.isinf(max_forget_bits):
            max_forget_bits = None
        self.hidden_size = hidden_size
        self.half = hidden_size // 2
        self.max_forget_bits = max_forget_bits
        self.forgets = max_forget_bits != 0
        self.fixed_point = FixedPoint(self.fraction_bits)
        self.floor = 0.0 if max_forget_bits is None else 2.0**-max_forget_bits
        """Lower limit of a forget gate before rounding."""
        self.lowest = lowest_gate(max_forget_bits)
        """Lower limit of 1024 times a forget gate."""
        self.slope = 1.0 - self.floor if self.forgets else 1.0
        """Derivative of a forget gate by the sigmoid in it."""

    @property
    @abstractmethod
    def gates(self) -> int:
        """Row blocks of `half` rows in the weights of a half-step."""

    @property
    @abstractmethod
    def fraction_bits(self) -> int:
        """Binary digits of a state after the point; 31 less them are left for its size."""

    @property
    def storage(self) -> Storage:
        """How a sweep keeps this cell's integers."""
        return Storage()

    @property
    def gate_rows(self) -> int:
        """Rows of `weight_ih`, `weight_hh` and the biases: both halves, all gates."""
        return 2 * self.gates * self.half

    def growth(self, steps: int) -> float:
        """By how much a state can outgrow its initial magnitude within `steps` steps.

        A state that forgets is bounded whatever the number of steps: RevGRU's by
        max(1, |h0|), being a convex combination, RevLSTM's by max(1024, |h0|), since it adds at
        most 1 per step and keeps at most 1023/1024. Rounding adds less than 1 in either case.
        The format of the cell has room for that. A state that never forgets can gain 1 per step.
        """
        return 1.0 if self.forgets else float(steps)

    def forget_gate(self, sigmoid: Tensor) -> ForgetGate:
        """Limit and round sigmoid outputs, shape (rows, any); unchanged without forgetting."""
        if not self.forgets:
            return ForgetGate(sigmoid, sigmoid)
        scaled = sigmoid * (GATE_ONE * self.slope)
        scaled.add_(GATE_ONE * self.floor).round_().clamp_(self.lowest, GATE_ONE - 1)
        return ForgetGate(sigmoid, scaled.mul_(1.0 / GATE_ONE))

    def forget_gate_gradient(self, gate: ForgetGate, grad: Tensor) -> Tensor:
        """Gradient of what went into the sigmoid; `grad` is overwritten."""
        return grad.mul_(gate.sigmoid).mul_(1.0 - gate.sigmoid).mul_(self.slope)

    def output(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The visible part h of a half's state, as floats of shape (rows, half), contiguous."""
        return self.fixed_point.to_float(state[:, -self.half :], dtype)

    @abstractmethod
    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> Gates:
        """The gates of a half-step.

        Args:
            projected: input weights times input plus bias, shape (rows, gates * half).
            other: the other half's h, shape (rows, half).
            weight: recurrent weights of this half.
        """

    @abstractmethod
    def forward_(self, state: Tensor, gates: Gates, buffer: InformationBuffer) -> None:
        """Advance a half's state in place."""

    def advance(
        self, state: Tensor, gates: Gates, buffer: InformationBuffer, dtype: torch.dtype
    ) -> Tensor:
        """`forward_`, then the new h as from `output`; a GPU does both at once."""
        self.forward_(state, gates, buffer)
        return self.output(state, dtype)

    @abstractmethod
    def reverse_(
        self, state: Tensor, gates: Gates, buffer: InformationBuffer, dtype: torch.dtype
    ) -> Undone:
        """Undo `forward_` in place, exactly."""

    @property
    @abstractmethod
    def recurrent_blocks(self) -> tuple[int, ...]:
        """How many gates in a row see the same recurrent input; sums to `gates`."""

    @abstractmethod
    def recurrent_inputs(self, gates: Gates, other: Tensor) -> tuple[Tensor, ...]:
        """What the recurrent weights of each block multiply, each (rows, half)."""

    @abstractmethod
    def forget_gates(self, gates: Gates) -> Tensor | None:
        """The integer forget gates of a half-step; None for a cell that does not forget."""

    @abstractmethod
    def vjp(
        self,
        gates: Gates,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Vector-Jacobian product of a half-step.

        Args:
            gates: of this half-step, as `activate` returned them.
            undone: what `reverse_` returned.
            other: the other half's h that `activate` saw.
            weight: recurrent weights of this half.
            grads: gradients of the half's new h (and c), each (rows, half).
            out: receives the gradient of `projected`, shape (rows, gates * half).

        Returns:
            Gradients of the half's old h (and c), and of `other`.
        """


def tanh_(x: Tensor) -> Tensor:
    """Hyperbolic tangent in place, absolute error 1e-7 in float32.

    On a CPU the vectorised sigmoid is 4 times faster than torch's tanh, and the states keep no
    more than 2^-23 of it.
    """
    return x.tanh_() if x.is_cuda else x.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)


class GRUGates(NamedTuple):
    """What a RevGRU half-step computes before it touches the state."""

    reset: Tensor
    forget: ForgetGate
    candidate: Tensor
    reset_other: Tensor


class RevGRUCell(Cell[GRUGates]):
    """RevGRU. Weight rows of a half: r, z, g (the order of nn.GRU)."""

    name = "RevGRU"
    states = 1
    forget_blocks = (1,)
    replay_floats = 6  # r, sigmoid, z, g, r * other, h

    @property
    def gates(self) -> int:
        return 3

    @property
    def fraction_bits(self) -> int:
        return 23 if self.forgets else 20

    @property
    def recurrent_blocks(self) -> tuple[int, ...]:
        return (2, 1)

    def recurrent_inputs(self, gates: GRUGates, other: Tensor) -> tuple[Tensor, ...]:
        return other, gates.reset_other

    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> GRUGates:
        two = 2 * self.half
        r, s = weight.linear(other, 0).add_(projected[:, :two]).sigmoid_().chunk(2, dim=1)
        reset_other = r * other
        g = tanh_(weight.linear(reset_other, 1).add_(projected[:, two:]))
        return GRUGates(r, self.forget_gate(s), g, reset_other)

    def forget_gates(self, gates: GRUGates) -> Tensor | None:
        return gates.forget.integer if self.forgets else None

    def _update(self, gates: GRUGates) -> Tensor:
        return self.fixed_point.from_float((1.0 - gates.forget.value).mul_(gates.candidate))

    def forward_(self, state: Tensor, gates: GRUGates, buffer: InformationBuffer) -> None:
        if self.forgets:
            buffer.multiply_(state, gates.forget.integer)
        state.add_(self._update(gates))

    def reverse_(
        self, state: Tensor, gates: GRUGates, buffer: InformationBuffer, dtype: torch.dtype
    ) -> Undone:
        state.sub_(self._update(gates))
        if self.forgets:
            buffer.divide_(state, gates.forget.integer)
        return Undone(self.output(state, dtype))

    def vjp(
        self,
        gates: GRUGates,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        half, two = self.half, 2 * self.half
        (grad,) = grads
        r, forget, g, _ = gates
        grad_g = (1.0 - forget.value).mul_(grad).mul_(1.0 - g * g)
        grad_reset_other = weight.transposed(grad_g, 1)
        out[:, :half] = (grad_reset_other * other).mul_(r).mul_(1.0 - r)
        kept = undone.h - g if self.forgets else -g
        out[:, half:two] = self.forget_gate_gradient(forget, kept.mul_(grad))
        out[:, two:] = grad_g
        grad_other = weight.transposed(out[:, :two], 0).addcmul_(grad_reset_other, r)
        return [grad * forget.value if self.forgets else grad], grad_other


class LSTMGates(NamedTuple):
    """What a RevLSTM half-step computes before it touches the state."""

    forget: ForgetGate | None
    """z and p side by side, (rows, 2 * half)."""
    input: Tensor
    output: Tensor
    candidate: Tensor


class RevLSTMCell(Cell[LSTMGates]):
    """RevLSTM. Weight rows of a half: z, p, f, o, g; without forgetting: f, o, g."""

    name = "RevLSTM"
    states = 2
    forget_blocks = (0, 1)
    replay_floats = 10  # five activations, z, p, c, h, tanh(c)

    @property
    def gates(self) -> int:
        return 5 if self.forgets else 3

    @property
    def fraction_bits(self) -> int:
        return 20

    @property
    def recurrent_blocks(self) -> tuple[int, ...]:
        return (self.gates,)

    def recurrent_inputs(self, gates: LSTMGates, other: Tensor) -> tuple[Tensor, ...]:
        return (other,)

    def activate(self, projected: Tensor, other: Tensor, weight: Recurrent) -> LSTMGates:
        half = self.half
        blocks = weight.linear(other, 0).add_(projected)
        candidate = tanh_(blocks[:, -half:])
        sigmoids = blocks[:, :-half].sigmoid_()
        f, o = sigmoids[:, -2 * half : -half], sigmoids[:, -half:]
        forget = self.forget_gate(sigmoids[:, : 2 * half]) if self.forgets else None
        return LSTMGates(forget, f, o, candidate)

    def forget_gates(self, gates: LSTMGates) -> Tensor | None:
        return None if gates.forget is None else gates.forget.integer

    def _updated_tanh_c(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        return tanh_(self.fixed_point.to_float(state[:, : self.half], dtype))

    def forward_(self, state: Tensor, gates: LSTMGates, buffer: InformationBuffer) -> None:
        c, h = state.chunk(2, dim=1)
        if gates.forget is not None:
            buffer.multiply_(state, gates.forget.integer)
        c.add_(self.fixed_point.from_float(gates.input * gates.candidate))
        tanh_c = self._updated_tanh_c(state, gates.output.dtype)
        h.add_(self.fixed_point.from_float(tanh_c.mul_(gates.output)))

    def reverse_(
        self, state: Tensor, gates: LSTMGates, buffer: InformationBuffer, dtype: torch.dtype
    ) -> Undone:
        c, h = state.chunk(2, dim=1)
        tanh_c = self._updated_tanh_c(state, dtype)
        h.sub_(self.fixed_point.from_float(tanh_c * gates.output))
        c.sub_(self.fixed_point.from_float(gates.input * gates.candidate))
        if gates.forget is not None:
            buffer.divide_(state, gates.forget.integer)
        return Undone(self.output(state, dtype), self.fixed_point.to_float(c, dtype), tanh_c)

    def vjp(
        self,
        gates: LSTMGates,
        undone: Undone,
        other: Tensor,
        weight: Recurrent,
        grads: Sequence[Tensor],
        out: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        half = self.half
        grad_h, grad_c = grads
        forget, f, o, g = gates
        assert undone.c is not None
        assert undone.tanh_c is not None
        tanh_c = undone.tanh_c
        through_h = (1.0 - tanh_c * tanh_c).mul_(grad_h).mul_(o)
        grad_c = grad_c + through_h
        out[:, -3 * half : -2 * half] = (grad_c * g).mul_(f).mul_(1.0 - f)
        out[:, -2 * half : -half] = (grad_h * tanh_c).mul_(o).mul_(1.0 - o)
        out[:, -half:] = (1.0 - g * g).mul_(grad_c).mul_(f)
        if forget is None:
            return [grad_h, grad_c], weight.transposed(out, 0)
        new = torch.cat([grad_c, grad_h], dim=1)
        old = torch.cat([undone.c, undone.h], dim=1)
        out[:, : 2 * half] = self.forget_gate_gradient(forget, old.mul_(new))
        new.mul_(forget.value)
        return [new[:, half:], new[:, :half]], weight.transposed(out, 0)
