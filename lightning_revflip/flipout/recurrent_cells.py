"""One step of an LSTM and of a GRU, forwards and backwards; gates in the order of torch.nn.

    LSTM    i, f, o = sigmoid(a_i + u_i), sigmoid(a_f + u_f), sigmoid(a_o + u_o)
            g = tanh(a_g + u_g)
            c' = f * c + i * g
            h' = o * tanh(c')

    GRU     r, z = sigmoid(a_r + u_r), sigmoid(a_z + u_z)
            n = tanh(a_n + r * u_n)
            h' = (1 - z) * n + z * h

Here `a` is what the input contributes and `u` is what the hidden state does, biases included, both
of shape (rows, gates * hidden_size). Weights do not occur: they are the matter of
`recurrent_pass.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_revflip.flipout.noise import LIBRARY, native


class Cell(ABC):
    """The arithmetic of one step; all states are (rows, hidden_size), the hidden one first."""

    gates: ClassVar[int]
    """How many gates there are, that is rows of a weight for each unit."""
    states: ClassVar[int]
    """How many states there are."""

    @abstractmethod
    def step(self, a: Tensor, u: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The new states, differentiable; the specification of `advance`."""

    @abstractmethod
    def advance(self, gates: Tensor, u: Tensor, kept: Tensor, states: Sequence[Tensor]) -> None:
        """Take a step in place.

        Args:
            gates: holds `a`; is overwritten with the gates.
            u: see above.
            kept: is overwritten with what `retreat` needs besides, (rows, hidden_size).
            states: are overwritten with the new ones.
        """

    @abstractmethod
    def retreat(
        self,
        gates: Tensor,
        kept: Tensor,
        hidden: Tensor,
        grads: Sequence[Tensor],
        grad_a: Tensor,
    ) -> None:
        """The vector-Jacobian product of `advance`.

        Args:
            gates: that `advance` left.
            kept: that `advance` left.
            hidden: the hidden state before the step.
            grads: gradients by the states after the step; are overwritten with those by the states
                before it, but for what passes through `u`.
            grad_a: is overwritten with the gradient by `a`.
        """

    @abstractmethod
    def grad_u(self, grad_a: Tensor, gates: Tensor) -> Tensor:
        """The gradient by `u`, given that by `a`; may be `grad_a` itself. (..., rows, features)."""


class LSTM(Cell):
    """Long short-term memory; keeps the cell state before the step."""

    gates = 4
    states = 2

    def step(self, a: Tensor, u: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        i, f, g, o = (a + u).chunk(4, dim=-1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def advance(self, gates: Tensor, u: Tensor, kept: Tensor, states: Sequence[Tensor]) -> None:
        h, c = states
        if native(gates, u, kept, h, c):
            LIBRARY.call("lstm_advance", *h.shape, gates, u, kept, h, c)
            return
        gates.add_(u)
        i, f, g, o = gates.chunk(4, dim=-1)
        gates[:, : 2 * h.shape[1]].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        kept.copy_(c)
        c.mul_(f).addcmul_(i, g)
        torch.mul(o, c.tanh(), out=h)

    def retreat(
        self,
        gates: Tensor,
        kept: Tensor,
        hidden: Tensor,
        grads: Sequence[Tensor],
        grad_a: Tensor,
    ) -> None:
        grad_h, grad_c = grads
        if native(gates, kept, grad_h, grad_c, grad_a):
            LIBRARY.call("lstm_retreat", *grad_h.shape, gates, kept, grad_h, grad_c, grad_a)
            return
        i, f, g, o = gates.chunk(4, dim=-1)
        tanh_c = torch.addcmul(f * kept, i, g).tanh_()
        torch.addcmul(gates, gates, gates, value=-1, out=grad_a)  # slopes of the sigmoids
        by_i, by_f, by_g, by_o = grad_a.chunk(4, dim=-1)
        by_o.mul_(tanh_c).mul_(grad_h)
        grad_c.addcmul_(grad_h * o, 1 - tanh_c.square_())
        by_i.mul_(g).mul_(grad_c)
        by_f.mul_(kept).mul_(grad_c)
        torch.mul(1 - g * g, i, out=by_g).mul_(grad_c)
        grad_c.mul_(f)
        grad_h.zero_()

    def grad_u(self, grad_a: Tensor, gates: Tensor) -> Tensor:
        return grad_a


class GRU(Cell):
    """Gated recurrent units; keeps u_n."""

    gates = 3
    states = 1

    def step(self, a: Tensor, u: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (h,) = states
        a_r, a_z, a_n = a.chunk(3, dim=-1)
        u_r, u_z, u_n = u.chunk(3, dim=-1)
        n = (a_n + (a_r + u_r).sigmoid() * u_n).tanh()
        return (n + (a_z + u_z).sigmoid() * (h - n),)

    def advance(self, gates: Tensor, u: Tensor, kept: Tensor, states: Sequence[Tensor]) -> None:
        (h,) = states
        if native(gates, u, kept, h):
            LIBRARY.call("gru_advance", *h.shape, gates, u, kept, h)
            return
        r, z, n = gates.chunk(3, dim=-1)
        sigmoids = 2 * h.shape[1]
        gates[:, :sigmoids].add_(u[:, :sigmoids]).sigmoid_()
        kept.copy_(u[:, sigmoids:])
        n.addcmul_(r, kept).tanh_()
        h.sub_(n).mul_(z).add_(n)

    def retreat(
        self,
        gates: Tensor,
        kept: Tensor,
        hidden: Tensor,
        grads: Sequence[Tensor],
        grad_a: Tensor,
    ) -> None:
        (grad_h,) = grads
        if native(gates, kept, hidden, grad_h, grad_a):
            LIBRARY.call("gru_retreat", *grad_h.shape, gates, kept, hidden, grad_h, grad_a)
            return
        _, z, n = gates.chunk(3, dim=-1)
        torch.addcmul(gates, gates, gates, value=-1, out=grad_a)  # slopes of the sigmoids
        by_r, by_z, by_n = grad_a.chunk(3, dim=-1)
        by_z.mul_(hidden - n).mul_(grad_h)
        torch.mul(1 - n * n, 1 - z, out=by_n).mul_(grad_h)
        by_r.mul_(kept).mul_(by_n)
        grad_h.mul_(z)

    def grad_u(self, grad_a: Tensor, gates: Tensor) -> Tensor:
        r, _, _ = gates.chunk(3, dim=-1)
        by_r, by_z, by_n = grad_a.chunk(3, dim=-1)
        return torch.cat([by_r, by_z, by_n * r], dim=-1)
