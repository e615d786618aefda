"""Rows of a batch of sequences, and their products with a perturbed weight.

Tensors of a batch have one of two layouts: dense, (steps, batch, features), or that of a
PackedSequence, (rows, features), where the rows of a step are the first `count` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_revflip.flipout.noise import composing


@dataclass(frozen=True)
class Rows:
    """Which sequence each row of a tensor (..., rows, features) belongs to."""

    sequences: slice | Tensor
    """Indexes what there is for each sequence, for example its signs."""
    groups: Sequence[slice | Tensor]
    """The rows of each group of sequences, see `Draw`."""
    restore: Tensor | None = None
    """Puts the rows of all groups, one group after the other, in order again; None if they are."""


@dataclass(frozen=True)
class Step:
    """A time step."""

    at: int | slice
    """Its place in the first dimension of a tensor of all steps."""
    count: int
    """How many sequences it has."""
    rows: Rows


class Steps:
    """The steps of a batch.

    Args:
        counts: how many sequences each step has, not increasing.
        groups: of sequences, see `Draw.groups`.
        device: of the tensors.
    """

    def __init__(
        self, counts: Sequence[int], groups: Sequence[slice], device: torch.device
    ) -> None:
        self.batch = counts[0]
        self.dense = counts[-1] == self.batch
        """Whether all sequences are equally long, so that the layout is dense."""
        bounds = pairwise(accumulate(counts, initial=0))
        places: Sequence[int | slice]
        places = range(len(counts)) if self.dense else [slice(*bound) for bound in bounds]
        self.steps = [
            Step(at, count, Rows(slice(0, count), _clipped(groups, count)))
            for at, count in zip(places, counts, strict=True)
        ]
        self.all = self.steps[0].rows if self.dense else _packed_rows(counts, groups, device)
        """The rows of all steps together."""

    def order(self, backwards: bool) -> Sequence[Step]:
        """The steps in the order in which they are taken."""
        return self.steps[::-1] if backwards else self.steps

    def join(self, parts: Sequence[Tensor], backwards: bool) -> Tensor:
        """A tensor of all steps, given that of each in the order in which they are taken."""
        parts = parts[::-1] if backwards else parts
        return torch.stack(list(parts)) if self.dense else torch.cat(list(parts))

    def before(self, states: Tensor, initial: Tensor, backwards: bool) -> Tensor:
        """The states before each step, given those after it and the initial ones."""
        parts = []
        last = initial
        for step in self.order(backwards):
            parts.append(last[: step.count])
            last = states[step.at]
            if backwards and step.count < self.batch:
                last = torch.cat([last, initial[step.count :]])
        return self.join(parts, backwards)


def _clipped(groups: Sequence[slice], count: int) -> list[slice]:
    return [slice(min(group.start, count), min(group.stop, count)) for group in groups]


def _packed_rows(counts: Sequence[int], groups: Sequence[slice], device: torch.device) -> Rows:
    """The rows of a PackedSequence."""
    every = torch.arange(counts[0])
    sequences = torch.cat([every[:count] for count in counts])
    if len(groups) == 1:
        return Rows(sequences.to(device), [slice(None)])
    places = [
        ((sequences >= group.start) & (sequences < group.stop)).nonzero().squeeze(1)
        for group in groups
    ]
    restore = torch.cat(places).argsort()
    return Rows(sequences.to(device), [place.to(device) for place in places], restore.to(device))


class PerturbedProduct:
    """Products with the weight of each sequence, W + dW_m * (r_n s_n^T).

    Args:
        weight: W, (out, in).
        bias: (out,), of the same dtype, or None.
        deltas: dW of each group, in the shape and dtype of W; none if it is not perturbed.
        signs: s and r, (batch, in) and (batch, out); None if it is not perturbed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        deltas: Sequence[Tensor] = (),
        signs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.deltas = deltas
        self.signs = signs

    def by_columns(self) -> PerturbedProduct:
        """The same with weights that lie in memory column by column.

        MKL applies these to the few rows of one step in three quarters of the time.
        """
        weight, *deltas = (w.t().contiguous().t() for w in (self.weight, *self.deltas))
        return PerturbedProduct(weight, self.bias, deltas, self.signs)

    def apply(self, x: Tensor, rows: Rows) -> Tensor:
        """The output (..., rows, out) of x (..., rows, in)."""
        y = F.linear(x, self.weight, self.bias)
        if self.signs is None:
            return y
        s, r = (signs[rows.sequences] for signs in self.signs)
        perturbed = _each_group(x * s, self.deltas, rows)
        return y + perturbed * r if composing() else y.addcmul_(perturbed, r)

    def transposed(self, grad: Tensor, rows: Rows) -> Tensor:
        """The gradient by x, given that by the output."""
        y: Tensor = grad @ self.weight
        if self.signs is None:
            return y
        s, r = (signs[rows.sequences] for signs in self.signs)
        deltas = [delta.t() for delta in self.deltas]
        return y.addcmul_(_each_group(grad * r, deltas, rows), s)

    def delta_grads(self, grad: Tensor, x: Tensor, rows: Rows) -> list[Tensor]:
        """The gradients by dW of each group, given that by the output."""
        if self.signs is None:
            return []
        s, r = (signs[rows.sequences] for signs in self.signs)
        grad, x = grad * r, x * s
        return [weight_grad(grad[..., group, :], x[..., group, :]) for group in rows.groups]


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient by the weight of a product, given that by its output, of all rows."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _each_group(x: Tensor, weights: Sequence[Tensor], rows: Rows) -> Tensor:
    """`x @ weight.T` for the rows and the weight of each group."""
    if len(weights) == 1:
        return F.linear(x, weights[0])
    pairs = zip(rows.groups, weights, strict=True)
    joined = torch.cat([F.linear(x[..., group, :], weight) for group, weight in pairs], dim=-2)
    return joined if rows.restore is None else joined[rows.restore]
