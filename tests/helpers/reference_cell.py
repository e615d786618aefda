"""RevGRU and RevLSTM written plainly for torch's autograd: the truth that gradients are held to.

Nothing is reversed and nothing is shared with the package: every step stays in the graph. Each
rounding of the package (forget gates to 1/1024, states to fixed point, the low bits that go through
the information buffer) takes its value from exact integer arithmetic and its gradient from the
smooth formula. With `rounding=False` the roundings are left out: that version can be compared with
finite differences.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class _ValueOf(torch.autograd.Function):
    """The value of `exact`, the gradient of `smooth`."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.to(smooth.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def tanh(x: Tensor) -> Tensor:
    """As it is computed on a CPU."""
    return 2.0 * torch.sigmoid(2.0 * x) - 1.0


@dataclass
class _Half:
    """State of one half: float64 multiples of the resolution; buffers, int64, one per number."""

    states: list[Tensor]
    """h, or h and c, each (batch, half)."""
    buffers: list[Tensor]


@dataclass(frozen=True)
class ReferenceRNN:
    """A stack of reversible layers.

    Args:
        kind: "RevGRU" or "RevLSTM".
        hidden_size: units of both halves.
        num_layers: layers on top of each other.
        bidirectional: two directions per layer.
        max_forget_bits: limit of the forget gates, None, or 0 for no forgetting.
        rounding: False for the smooth formulas.
        forgotten: receives the forget gates of every half-step, as integers.
        imposed: forget gates to use instead of the rounded ones, as integers in the order of use.
            A gate that another implementation rounds the other way is no error of its gradients.
        sliced: the first units of h of the top layer that are kept after every step. Their product
            with a forget gate is rounded, ties to even; they have no digits in a buffer, and their
            gates are not among the `forgotten`.
    """

    kind: str
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    max_forget_bits: float | None = 3.0
    rounding: bool = True
    forgotten: list[Tensor] = field(default_factory=list)
    imposed: Iterator[Tensor] | None = None
    sliced: int = 0

    @classmethod
    def of(cls, rnn: nn.RNNBase, rounding: bool = True, sliced: int = 0) -> "ReferenceRNN":
        """With the settings of a RevGRU or RevLSTM."""
        return cls(
            rnn.mode,
            rnn.hidden_size,
            rnn.num_layers,
            rnn.bidirectional,
            rnn.max_forget_bits,
            rounding,
            sliced=sliced,
        )

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        x: Tensor,
        initial: Sequence[Tensor] = (),
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs (steps, batch, directions * hidden), zero after the end, and final h (and c).

        Args:
            parameters: under the names of nn.GRU. `weight_hh` may have one more dimension in front:
                other recurrent weights for each sequence.
            x: (steps, batch, features).
            initial: h_0 (and c_0), each (layers * directions, batch, hidden); none for zero.
            lengths: of each sequence, in any order; None: all of them have all steps.
        """
        steps, batch = x.shape[:2]
        lengths = torch.tensor([steps] * batch if lengths is None else list(lengths))
        alive = (torch.arange(steps)[:, None] < lengths).unsqueeze(2)
        finals: list[list[Tensor]] = []
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            outputs = []
            for suffix in directions:
                weights = {
                    name: parameters[f"{name}_l{layer}{suffix}"]
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                    if f"{name}_l{layer}{suffix}" in parameters
                }
                given = [state[len(finals)] for state in initial]
                sliced = self.sliced if layer == self.num_layers - 1 else 0
                out, final = self._direction(weights, x, given, alive, suffix == "_reverse", sliced)
                outputs.append(out)
                finals.append(final)
            x = torch.cat(outputs, dim=2)
        return x, [torch.stack(states) for states in zip(*finals, strict=True)]

    def _direction(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        given: list[Tensor],
        alive: Tensor,
        reverse: bool,
        sliced: int,
    ) -> tuple[Tensor, list[Tensor]]:
        halves = self._start(x, given)
        first = min(sliced, self.hidden_size // 2)
        kept = (first, sliced - first)
        w_ih, w_hh = (weights[name].chunk(2, dim=-2) for name in ("weight_ih", "weight_hh"))
        zero = x.new_zeros(len(weights["weight_ih"]))
        bias = (weights.get("bias_ih", zero) + weights.get("bias_hh", zero)).chunk(2)
        outputs: list[Tensor] = [x] * len(x)
        order = range(len(x))
        for t in reversed(order) if reverse else order:
            for i in (0, 1):
                projected = x[t] @ w_ih[i].t() + bias[i]
                other = halves[1 - i].states[0].to(x.dtype)
                new = self._step(halves[i], other, projected, w_hh[i], kept[i])
                halves[i] = _Half(
                    _where(alive[t], new.states, halves[i].states),
                    _where(alive[t], new.buffers, halves[i].buffers),
                )
            outputs[t] = torch.cat([half.states[0].to(x.dtype) for half in halves], 1) * alive[t]
        final = [torch.cat(pair, 1) for pair in zip(*(h.states for h in halves), strict=True)]
        return torch.stack(outputs), [state.to(x.dtype) for state in final]

    def _start(self, x: Tensor, given: list[Tensor]) -> list[_Half]:
        count = 1 if self.kind == "RevGRU" else 2
        if not given:
            given = [x.new_zeros(x.shape[1], self.hidden_size)] * count
        pairs = [self._fixed(state).chunk(2, dim=1) for state in given]
        return [
            _Half(list(states), [torch.full(s.shape, 2**15) for s in states])
            for states in zip(*pairs, strict=True)
        ]

    def _step(
        self, half: _Half, other: Tensor, projected: Tensor, w_hh: Tensor, kept: int
    ) -> _Half:
        """One half-step: the equations of the paper. `kept`: how many units of h are."""
        size = other.shape[1]
        if self.kind == "RevGRU":
            (h,) = half.states
            w_rz, w_g = w_hh.split((2 * size, size), dim=-2)
            r, s = torch.sigmoid(_product(other, w_rz) + projected[:, : 2 * size]).chunk(2, dim=1)
            g = tanh(_product(r * other, w_g) + projected[:, 2 * size :])
            z = self._forget_gate(s, kept)
            h, buffer = self._keep(h, z, half.buffers[0], kept)
            return _Half([self._fixed(h + self._fixed((1 - z) * g))], [buffer])
        h, c = half.states
        blocks = _product(other, w_hh) + projected
        *forget, f, o = torch.sigmoid(blocks[:, :-size]).split(size, dim=1)
        g = tanh(blocks[:, -size:])
        h_buffer, c_buffer = half.buffers
        if forget:
            z, p = (self._forget_gate(s, n) for s, n in zip(forget, (0, kept), strict=True))
            c, c_buffer = self._keep(c, z, c_buffer, 0)
            h, h_buffer = self._keep(h, p, h_buffer, kept)
        c = c + self._fixed(f * g)
        h = h + self._fixed(o * tanh(c.to(other.dtype)))
        return _Half([h, c], [h_buffer, c_buffer])

    @property
    def scale(self) -> int:
        """The integer that stands for a state of 1."""
        forgetful_gru = self.kind == "RevGRU" and self.max_forget_bits != 0
        return 2**23 if forgetful_gru else 2**20

    def _fixed(self, x: Tensor) -> Tensor:
        x = x.double()
        return _ValueOf.apply(x, (x * self.scale).round() / self.scale) if self.rounding else x

    def _forget_gate(self, sigmoid: Tensor, kept: int) -> Tensor:
        """a + (1 - a) * sigmoid with a = 2^-max_forget_bits."""
        if self.max_forget_bits == 0:
            return sigmoid
        a = 0.0 if self.max_forget_bits is None else 2.0**-self.max_forget_bits
        z = a + (1 - a) * sigmoid
        if not self.rounding:
            return z
        lowest = max(1, min(1023, -int(-1024 * a // 1)))
        integer = (sigmoid * (1024 * (1 - a)) + 1024 * a).round().clamp(lowest, 1023)
        if self.imposed is not None:
            integer = next(self.imposed)
        self.forgotten.append(integer.detach().long()[:, kept:])
        return _ValueOf.apply(z, integer / 1024)

    def _keep(self, state: Tensor, z: Tensor, buffer: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """`z * state`: with rounding, its last bits are digits of the information buffer."""
        if self.max_forget_bits == 0:
            return state, buffer
        smooth = z.double() * state
        if not self.rounding:
            return smooth, buffer
        gate = (z.detach().double() * 1024).round().long()
        integer = (state.detach() * self.scale).round().long()
        rounded = ((integer * gate).double() / 1024).round()  # exact, then ties to even
        digits = torch.where(buffer >= gate * 2**21, buffer // 2**16, buffer)
        product = integer * gate + digits % gate
        exact = torch.cat([rounded[:, :kept], (product // 1024).double()[:, kept:]], dim=1)
        digits = digits // gate * 1024 + product % 1024
        buffer = torch.cat([buffer[:, :kept], digits[:, kept:]], dim=1)
        return _ValueOf.apply(smooth, exact / self.scale), buffer


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, or `x[n] @ weight[n].T` where every row has weights of its own."""
    return x @ weight.t() if weight.dim() == 2 else torch.einsum("nj,nij->ni", x, weight)


def _where(mask: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    return [torch.where(mask, a, b) for a, b in zip(new, old, strict=True)]
