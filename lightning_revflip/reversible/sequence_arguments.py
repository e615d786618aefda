"""Checking and unpacking the arguments of `ReversibleSequence`, and packing what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_revflip.reversible.layout import Layout
from lightning_revflip.reversible.rnn import RevGRU, RevLSTM
from lightning_revflip.reversible.rnn_base import ReversibleRNNBase


def check_rnns(rnns: Sequence[Any]) -> None:
    """Raise a ValueError unless these can be the layers of a sequence."""
    if not rnns:
        raise ValueError("rnn must be a RevGRU or RevLSTM, or several of one kind, got none.")
    for rnn in rnns:
        if not isinstance(rnn, RevGRU | RevLSTM):
            raise ValueError(
                f"rnn must be a RevGRU or RevLSTM, got {type(rnn).__name__}. An ordinary layer "
                "becomes one by RevLSTM.from_standard(layer), or by lightning_revflip.convert "
                "before the sequence is built."
            )
        if rnn.bidirectional:
            raise ValueError(
                "A bidirectional rnn cannot run in a ReversibleSequence: its backward direction "
                "needs the end of the sequence before the first output. Use RevGRU or RevLSTM "
                "as layers, or bidirectional=False."
            )
        if type(rnn) is not type(rnns[0]) or rnn.batch_first != rnns[0].batch_first:
            raise ValueError(
                "all rnns of a ReversibleSequence must be of one kind and agree in batch_first, "
                f"got {rnns}."
            )
    for below, above in pairwise(rnns):
        if below.hidden_size != above.input_size:
            raise ValueError(
                f"an rnn with {below.hidden_size} units is followed by one that takes "
                f"{above.input_size} features; input_size must be {below.hidden_size}."
            )


def layout_of(parts: Sequence[Any], batch_first: bool) -> tuple[Layout, PackedSequence | None]:
    """The layout of the inputs, and one of them if they are packed."""
    first = parts[0] if parts else None
    if isinstance(first, PackedSequence):
        return Layout(tuple(first.batch_sizes.tolist()), batch_first, packed=True), first
    if not isinstance(first, Tensor) or first.dim() < 2:
        order = "(batch, steps, ...)" if batch_first else "(steps, batch, ...)"
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"inputs must be a tensor {order} or a PackedSequence, got {got}.")
    steps, batch = first.shape[:2][::-1] if batch_first else first.shape[:2]
    if not steps or not batch:
        raise ValueError(f"inputs hold no time step or no sequence: {tuple(first.shape)}.")
    return Layout((batch,) * steps, batch_first), None


def data_of(part: Any, layout: Layout, template: PackedSequence | None, name: str) -> Tensor:
    """The tensor that holds the steps of an argument.

    Raises:
        ValueError: if it has other steps than the layout.
    """
    if template is not None:
        if not isinstance(part, PackedSequence):
            raise ValueError(
                f"the inputs are packed, so {name} must be a PackedSequence of the same lengths, "
                f"got {type(part).__name__}. Use pack_padded_sequence with the same lengths."
            )
        orders = (part.sorted_indices, template.sorted_indices)
        same_order = orders[0] is orders[1] or (
            orders[0] is not None and orders[1] is not None and torch.equal(*orders)  # type: ignore[arg-type]
        )
        if not torch.equal(part.batch_sizes, template.batch_sizes) or not same_order:
            raise ValueError(
                f"{name} must be packed with the lengths of the inputs: batch_sizes "
                f"{template.batch_sizes.tolist()} in the same order, got "
                f"{part.batch_sizes.tolist()}."
            )
        return part.data
    shape = layout.shape(range(layout.steps))
    if not isinstance(part, Tensor) or tuple(part.shape[:2]) != shape:
        got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        order = "(batch, steps)" if layout.batch_first else "(steps, batch)"
        raise ValueError(
            f"{name} must begin with the dimensions {order} = {shape} of the inputs, got {got}."
        )
    return part


def initial_states(
    rnns: Sequence[ReversibleRNNBase],
    state: Any,
    layout: Layout,
    template: PackedSequence | None,
) -> list[Tensor]:
    """The h (and c) of each layer in turn, (batch, hidden_size); empty for zero states."""
    if state is None:
        for rnn in rnns:
            weight, _, _ = rnn.effective_weights("l0")
            rnn.check_states([], layout.batch, layout.steps, weight.dtype)
        return []
    if not isinstance(state, list | tuple) or len(state) != len(rnns):
        raise ValueError(
            f"state must be a list with the state of each of the {len(rnns)} rnns, "
            f"or None, got {type(state).__name__}"
            + (f" of {len(state)}." if isinstance(state, list | tuple) else ".")
        )
    found: list[Tensor] = []
    for rnn, given in zip(rnns, state, strict=True):
        count = rnn.cell.states
        parts = [given] if isinstance(given, Tensor) else list(given or ())
        if len(parts) != count or not all(isinstance(part, Tensor) for part in parts):
            expected = "a tensor h" if count == 1 else "a tuple (h, c)"
            raise ValueError(
                f"the state of a {rnn.mode} must be {expected}, got {type(given).__name__}"
                + (f" of {len(parts)}." if isinstance(given, tuple | list) else ".")
            )
        weight, _, _ = rnn.effective_weights("l0")
        rnn.check_states(parts, layout.batch, layout.steps, weight.dtype)
        if template is not None and template.sorted_indices is not None:
            parts = [part.index_select(1, template.sorted_indices) for part in parts]
        found += [part[layer] for layer in range(rnn.num_layers) for part in parts]
    return found


def final_states(
    rnns: Sequence[ReversibleRNNBase],
    finals: Sequence[Tensor],
    template: PackedSequence | None,
) -> list[Any]:
    """The states in the shape that the caller gives them in."""
    rest = list(finals)
    states: list[Any] = []
    for rnn in rnns:
        count = rnn.cell.states
        mine, rest = rest[: count * rnn.num_layers], rest[count * rnn.num_layers :]
        parts = [torch.stack(mine[i::count]) for i in range(count)]
        if template is not None and template.unsorted_indices is not None:
            parts = [part.index_select(1, template.unsorted_indices) for part in parts]
        states.append(parts[0] if count == 1 else tuple(parts))
    return states


def wrapped(result: Tensor, template: PackedSequence | None) -> Tensor | PackedSequence:
    """A result in the layout of the inputs."""
    if template is None or result.dim() == 0:
        return result
    return template._replace(data=result)
