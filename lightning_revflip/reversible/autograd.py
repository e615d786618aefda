"""A layer's forward and backward sweep as one `torch.autograd.Function`.

Forward keeps the input, the final state and the information buffer, and nothing per step. Backward
walks the chunks in reverse order; each is undone exactly and differentiated. When it arrives at
the beginning, state and buffer must be those of the start, bit for bit, or `ReversalError` is
raised. Autocast is off in both passes; the precision of matrix products is chosen once, by the
caller, so a different autocast state around `backward()` changes nothing.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_revflip.reversible.cells import Cell
from lightning_revflip.reversible.errors import ReversalError, refuse_double_backward
from lightning_revflip.reversible.kernels.cuda_graph import ChunkReplay, graphs_enabled
from lightning_revflip.reversible.layer_tensors import Gradients, LayerTensors
from lightning_revflip.reversible.products import Products
from lightning_revflip.reversible.schedule import Schedule
from lightning_revflip.reversible.sweep import LayerSweep, SweepState


@dataclass(frozen=True)
class Settings:
    """What a pass over one layer and direction is told besides tensors."""

    cell: Cell[Any]
    schedule: Schedule
    products: Products
    """How to multiply; outputs have its dtype."""
    store: bool
    """Whether a backward pass may follow."""
    on_forward: Callable[[LayerSweep, SweepState], None]
    """Called at the end of the forward sweep, for statistics."""


class ReversibleLayer(torch.autograd.Function):
    """Outputs and final states of a layer; see `rnn_base.py` for how its arguments are made.

    Arguments of `apply`: settings; x, (rows, input_size) or (steps, batch, input_size); the
    `LayerTensors` one by one; the initial h (and c), each (batch, hidden_size), or none of them.
    Returns h after every step, shape (rows, hidden_size), then the final h (and c).
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        x: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:
        cell, schedule = settings.cell, settings.schedule
        tensors, initial = _split(arguments)
        with torch.autocast(x.device.type, enabled=False):
            # Room for words is guessed where it cannot grow on the way; at worst once in vain.
            for certain in (False, True):
                layer = LayerSweep.of(cell, schedule, settings.products, tensors)
                state = _initial_state(settings, x, initial)
                state.reserve(len(schedule.batch_sizes), certain)
                replay = ChunkReplay(layer, state, graphs_enabled(x.device, cell))
                out = x.new_empty(schedule.rows, cell.hidden_size, dtype=settings.products.dtype)
                for chunk in schedule.chunks():
                    replay.forward_chunk(chunk, chunk.rows(x), out[chunk.start : chunk.stop])
                if not state.overflowed():
                    break
            if not layer.is_finite(state):
                raise_not_finite({"the input": x, **tensors.named()})
            settings.on_forward(layer, state)
            if settings.store:
                ctx.settings = settings
                ctx.given = len(initial)
                ctx.save_for_backward(x, *arguments, *state.compact())
                ctx.set_materialize_grads(False)
            return out, *state.floats(arguments[0].dtype)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, *grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a reversible layer", "nn.GRU or nn.LSTM")
        settings: Settings = ctx.settings
        x, *saved = saved_tensors(ctx)
        tensors, rest = _split(saved)
        initial, compact = rest[: ctx.given], rest[ctx.given :]
        needs, _ = _split(ctx.needs_input_grad[2:])
        with torch.autocast(x.device.type, enabled=False):
            layer = LayerSweep.of(settings.cell, settings.schedule, settings.products, tensors)
            state = SweepState.from_compact(settings.cell, *compact)
            replay = ChunkReplay(layer, state, graphs_enabled(x.device, settings.cell))
            grads = zero_gradients(layer, grad_final, bool(needs.delta))
            grad_x = x.new_empty(x.shape) if ctx.needs_input_grad[1] else None
            for chunk in reversed(settings.schedule.chunks()):
                rows = chunk.rows(x)
                part = None if grad_out is None else grad_out[chunk.start : chunk.stop]
                grad_rows = replay.backward_chunk(chunk, rows, part, grads)
                if grad_x is not None:
                    target = grad_x.flatten(0, -2)
                    target[chunk.start : chunk.stop] = grad_rows
            state.check_is(_initial_state(settings, x, initial))
            states = [torch.cat(pair, dim=1) for pair in zip(*grads.states, strict=True)]
            return (
                None,
                grad_x,
                *(
                    None if grad is None or tensor is None else grad.to(tensor.dtype)
                    for grad, tensor in zip(grads.tensors(), tensors, strict=True)
                ),
                *(grad.to(given.dtype) for grad, given in zip(states, initial, strict=False)),
            )


def reversible_layer(settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """`ReversibleLayer.apply`, typed."""
    outputs: tuple[Tensor, ...] = uncompiled(ReversibleLayer.apply)(settings, *tensors)
    return outputs


def uncompiled(function: Any) -> Any:
    """A function that a surrounding `torch.compile` calls as it is.

    A compiler would fuse gates differently in the two passes, and reversal be inexact.
    """
    if "torch._dynamo" not in sys.modules:  # `disable` would import it, which takes 2 s
        return function
    disable: Any = torch.compiler.disable
    return disable(function)


def _split(arguments: Sequence[Any]) -> tuple[LayerTensors, Sequence[Any]]:
    """The layer's tensors, and what comes after them."""
    count = len(LayerTensors._fields)
    return LayerTensors(*arguments[:count]), arguments[count:]


def _initial_state(settings: Settings, x: Tensor, initial: Any) -> SweepState:
    batch = settings.schedule.batch
    return SweepState.initial(settings.cell, batch, list(initial), x.device, settings.store)


def zero_gradients(
    layer: LayerSweep, grad_final: Sequence[Tensor | None], delta: bool = False
) -> Gradients:
    """What a backward sweep accumulates in.

    Args:
        layer: to be swept.
        grad_final: gradients of the final h (and c), or None.
        delta: whether that of the perturbation is wanted.
    """

    def zeros(like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=layer.dtype)

    batch, cell = layer.schedule.batch, layer.cell
    shape = (batch, cell.hidden_size)
    finals = [
        layer.weight_hh.new_zeros(shape, dtype=layer.dtype)
        if grad is None
        else grad.to(layer.dtype, copy=True)
        for grad in grad_final
    ]
    halves = [[part.contiguous() for part in grad.chunk(2, dim=1)] for grad in finals]
    states = [list(parts) for parts in zip(*halves, strict=True)]
    bias = None if layer.bias is None else zeros(layer.bias)
    weights = zeros(layer.weight_ih), zeros(layer.weight_hh)
    return Gradients(*weights, bias, states, zeros(layer.weight_hh) if delta else None)


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What forward saved.

    Raises:
        ReversalError: if some of it was changed in place.
    """
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "inplace operation" in str(error):
            raise ReversalError("autograd noticed a change in place") from error
        raise


def raise_not_finite(named: Mapping[str, Tensor | None]) -> NoReturn:
    """Say which of the tensors that went into a forward sweep are not finite.

    Args:
        named: the tensors by their names in the message.

    Raises:
        ValueError: always.
    """
    found = [
        name for name, tensor in named.items() if tensor is not None and not tensor.isfinite().all()
    ]
    raise ValueError(
        f"a reversible recurrence needs finite numbers, got NaN or infinity in "
        f"{' and '.join(found) or 'the gates (overflow in a matrix product)'}. "
        "Training has most likely diverged: lower the learning rate or clip gradients."
    )
