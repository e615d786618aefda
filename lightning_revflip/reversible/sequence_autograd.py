"""The autograd Function of `ReversibleSequence`.

A read-out that returns a loss is differentiated in the forward pass, in the sweep back that follows
at once: it runs once, and all that is kept are the gradients. A read-out that returns outputs runs
in the forward sweep, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lightning_revflip.reversible.autograd import saved_tensors
from lightning_revflip.reversible.errors import refuse_double_backward
from lightning_revflip.reversible.results import Results
from lightning_revflip.reversible.sequence_pass import (
    MaybeTensor,
    SequencePass,
    SequencePlan,
    Tensors,
    in_groups,
)
from lightning_revflip.reversible.slices import stand_in
from lightning_revflip.reversible.sweep import SweepState


class ReversibleSequenceFunction(torch.autograd.Function):
    """Results of the read-out, then the final h (and c) of each layer.

    Arguments of `apply`: the plan, then all tensors in the order of `Tensors`.
    """

    @staticmethod
    def forward(ctx: Any, plan: SequencePlan, *flat: MaybeTensor) -> tuple[Tensor, ...]:
        tensors = Tensors.grouped(flat, plan.sizes)
        needs = Tensors.grouped(ctx.needs_input_grad[1:], plan.sizes)
        early = plan.store and plan.early
        run = SequencePass(plan, tensors, needs, differentiated=early)
        results = Results(plan.stack.layout)
        slices = run.stack.slices
        visit = None if early or slices is not None else run.visit(results)
        states, starts = run.run(lambda: run.forward(visit))
        dtype = cast(Tensor, tensors.weights[0]).dtype
        finals = [part for state in states for part in state.floats(dtype)]
        ctx.set_materialize_grads(False)
        if early:

            def grads_of(steps: range, result: tuple[Tensor, ...]) -> Sequence[MaybeTensor]:
                _check_has_gradient(result[0])
                results.add(steps, result)
                return [torch.ones_like(result[0]), *[None] * (len(result) - 1)]

            read_out = run.differentiated(grads_of)
            ctx.gradients = run.run(
                lambda: run.backward(states, starts, read_out, [None] * len(finals))
            )
            found = results.all()
            ctx.mark_non_differentiable(*found[1:], *finals)
            return (*found, *finals)
        if slices is None:
            found = results.all()
        else:
            layout = plan.stack.layout
            found = (layout.unflat(slices.floats(dtype), range(layout.steps)),)
            if plan.read_out.with_inputs:
                features = run.stack.layers[0].weight_ih.shape[1]
                found += (stand_in((*found[0].shape[:-1], features), found[0]),)
        if plan.store:
            ctx.plan, ctx.results, ctx.sums = plan, len(found), run.stack.sums
            compact = [part for state in states for part in state.compact()]
            before = [half for start in starts for half in start]
            kept = () if slices is None else (found[0],)
            ctx.save_for_backward(*flat, *before, *compact, *kept)
            if plan.loss:
                ctx.mark_non_differentiable(*found[1:])
        return (*found, *finals)

    @staticmethod
    def backward(ctx: Any, *grads: MaybeTensor) -> tuple[MaybeTensor, ...]:
        refuse_double_backward("a ReversibleSequence", "the plain modules with nn.GRU or nn.LSTM")
        if hasattr(ctx, "gradients"):
            return (None, *_scaled(ctx, grads[0]))
        plan: SequencePlan = ctx.plan
        saved = saved_tensors(ctx)
        count, layers = sum(plan.sizes), len(plan.stack.cells)
        kept: Tensor | None = None
        if plan.stack.sliced_units is not None:
            saved, kept = saved[:-1], saved[-1]
        flat, before, compact = (
            saved[:count],
            in_groups(saved[count : -3 * layers], layers),
            in_groups(saved[-3 * layers :], 3),
        )
        needs = Tensors.grouped(ctx.needs_input_grad[1:], plan.sizes)
        tensors = Tensors.grouped(flat, plan.sizes)
        run = SequencePass(plan, tensors, needs, differentiated=True)
        run.stack.sums = ctx.sums
        grad_results, grad_finals = grads[: ctx.results], grads[ctx.results :]
        layout = plan.stack.layout

        def grads_of(steps: range, result: tuple[Tensor, ...]) -> Sequence[MaybeTensor]:
            if plan.loss:
                _check_has_gradient(result[0])
            return [
                grad if grad is None or part.dim() == 0 else layout.cut(grad, steps)
                for part, grad in zip(result, grad_results, strict=True)
            ]

        states = [
            SweepState.from_compact(cell, *parts)
            for cell, parts in zip(plan.stack.cells, compact, strict=True)
        ]
        grad_front = None
        if kept is not None:
            run.stack.restore_slices(layout.flat(kept))
            read_out = run.slice_gradient(grad_results[0])
            if len(grad_results) > 1 and grad_results[1] is not None:
                grad_front = layout.flat(grad_results[1])
        elif all(grad is None for grad in grad_results):
            read_out = run.no_gradient
        else:
            read_out = run.differentiated(grads_of)
        sweep = partial(run.backward, states, before, read_out, grad_finals, grad_front)
        return (None, *run.run(sweep))


def _check_has_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ValueError(
            "read_out returned a loss without gradient: it does not depend on the hidden states or "
            "on parameters that require one, or was detached (`.item()`, `.detach()`, argmax, "
            "torch.no_grad). Return a differentiable loss, or call the sequence under "
            "torch.no_grad()."
        )


def _scaled(ctx: Any, grad_loss: MaybeTensor) -> list[MaybeTensor]:
    """The gradients of an early pass times that of the loss."""
    if ctx.gradients is None:
        raise RuntimeError(
            "Trying to backward through a ReversibleSequence a second time: its gradients were "
            "handed over the first time. Call the sequence again."
        )
    gradients, ctx.gradients = ctx.gradients, None
    if grad_loss is None:
        return [None] * len(gradients)
    return [None if grad is None else grad.mul_(grad_loss) for grad in gradients]
