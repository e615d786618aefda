"""A layer of an LSTM or GRU in one direction with perturbed weights.

Each sequence sees one W + dW * (r_n s_n^T) at all steps, with signs of their own for input and
recurrent weights (Wen et al., 2018, arXiv 1803.04386). Signs being constant over time, the input
weights meet all steps in one product, and so do the gradients of all weights. Noise and signs are
drawn again from their seeds in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.noise import composing
from lightning_revflip.flipout.perturbation_sample import check_first_derivative, sample
from lightning_revflip.flipout.perturbations import Perturbation, Spread
from lightning_revflip.flipout.recurrent_cells import Cell
from lightning_revflip.flipout.recurrent_rows import PerturbedProduct, Steps, weight_grad


@dataclass(frozen=True)
class Weight:
    """The input or the recurrent weight in one call."""

    mean: Tensor
    bias: Tensor | None
    spread: Spread
    """Parameters of the perturbation."""
    draw: Draw | None
    """Random numbers of the perturbation; None: not perturbed."""


@dataclass(frozen=True)
class Setting:
    """What a pass is told besides tensors."""

    cell: Cell
    perturbation: Perturbation
    steps: Steps
    backwards: bool
    """Whether to begin with the last step."""


def recurrent_pass(
    setting: Setting, x: Tensor, states: Sequence[Tensor], weights: Sequence[Weight]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs and last states of a layer in one direction, under the present autocast state.

    Products are computed in the dtype of autocast, or of the input; gates in float32 at least.

    Args:
        setting: see there.
        x: input in the layout of `setting.steps`, (..., features).
        states: initial states, (batch, hidden_size) each.
        weights: input weight and recurrent weight.

    Returns:
        Output (..., hidden_size) in the layout of the input, and the states after the last step of
        each sequence, in the dtype of products.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        if composing():
            return _composed(setting, x, states, weights)
        draws = tuple(weight.draw for weight in weights)
        means = [tensor for weight in weights for tensor in (weight.mean, weight.bias)]
        spreads = [tensor for weight in weights for tensor in weight.spread]
        output, *last = RecurrentPass.apply(  # type: ignore[no-untyped-call]
            setting, draws, x, *states, *means, *spreads
        )
        return output, tuple(last)


class RecurrentPass(torch.autograd.Function):
    """See `recurrent_pass`."""

    @staticmethod
    def forward(
        ctx: Any,
        setting: Setting,
        draws: tuple[Draw | None, Draw | None],
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.setting, ctx.draws = setting, draws
        states, weights = _unpacked(setting, draws, tensors)
        output, last, gates, kept = _forward(setting, x, states, weights)
        ctx.save_for_backward(x, gates, kept, output, *tensors)
        return output, *last

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *grad_last: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        setting, draws = ctx.setting, ctx.draws
        x, gates, kept, output, *tensors = ctx.saved_tensors
        states, weights = _unpacked(setting, draws, tensors)
        _, _, by_x, *needed = ctx.needs_input_grad
        _, wanted = _unpacked(setting, draws, needed)  # in the same structure, as booleans
        with torch.autocast(x.device.type, enabled=False):
            products = [_product(setting, weight, x.dtype) for weight in weights]
            hidden = setting.steps.before(output, states[0].to(x.dtype), setting.backwards)
            grad_a, grad_states = _through_time(
                setting, products[1], gates, kept, hidden, grad_output, grad_last
            )
            grad_u = setting.cell.grad_u(grad_a, gates).to(x.dtype)
            grad_a = grad_a.to(x.dtype)
            grad_x = products[0].transposed(grad_a, setting.steps.all) if by_x else None
            grads = [
                _weight_grads(setting, *each)
                for each in zip(
                    weights, wanted, products, (grad_a, grad_u), (x, hidden), strict=True
                )
            ]
        pairs = zip(grad_states, states, strict=True)
        grad_states = [grad.to(state.dtype) for grad, state in pairs]
        means = [grad for weight in grads for grad in (weight.mean, weight.bias)]
        spreads = [grad for weight in grads for grad in weight.spread]
        return None, None, grad_x, *grad_states, *means, *spreads


def _unpacked(
    setting: Setting, draws: Sequence[Draw | None], tensors: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], list[Weight]]:
    """The states and the weights that the tensors of `RecurrentPass` consist of."""
    given: Any = tensors
    count = setting.cell.states
    states, means, spreads = given[:count], given[count : count + 4], given[count + 4 :]
    weights = []
    for number, draw in enumerate(draws):
        size = 0 if draw is None else len(setting.perturbation.spread_names)
        mean, bias = means[2 * number : 2 * number + 2]
        weights.append(Weight(mean, bias, spreads[:size], draw))
        spreads = spreads[size:]
    return states, weights


def _product(setting: Setting, weight: Weight, dtype: torch.dtype) -> PerturbedProduct:
    """Products with a weight, whose noise and signs are drawn here; differentiable."""
    batch, (outputs, inputs) = setting.steps.batch, weight.mean.shape
    mean = weight.mean.to(dtype)
    bias = None if weight.bias is None else weight.bias.to(dtype)
    draw = weight.draw
    if draw is None:
        return PerturbedProduct(mean, bias)
    deltas = [
        sample(setting.perturbation, draw.weight_seed(group), weight.mean, weight.spread).to(dtype)
        for group in range(len(draw.groups(batch)))
    ]
    s, r = draw.input_signs(batch, inputs, mean), draw.output_signs(batch, outputs, mean)
    if s is None or r is None:
        return PerturbedProduct(mean + deltas[0], bias)
    return PerturbedProduct(mean, bias, deltas, (s, r))


def _forward(
    setting: Setting, x: Tensor, states: Sequence[Tensor], weights: Sequence[Weight]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Output, last states, and what the cell keeps of each step for the backward pass."""
    by_input, by_hidden = (_product(setting, weight, x.dtype) for weight in weights)
    by_hidden = by_hidden.by_columns()
    dtype = torch.promote_types(x.dtype, torch.float32)
    gates = by_input.apply(x, setting.steps.all).to(dtype)
    size = states[0].shape[-1]
    kept = gates.new_empty(*x.shape[:-1], size)
    output = x.new_empty(*x.shape[:-1], size)
    last = [state.to(dtype, copy=True) for state in states]
    for step in setting.steps.order(setting.backwards):
        active = [state[: step.count] for state in last]
        u = by_hidden.apply(active[0].to(x.dtype), step.rows)
        setting.cell.advance(gates[step.at], u, kept[step.at], active)
        output[step.at] = active[0]
    return output, [state.to(x.dtype) for state in last], gates, kept


def _through_time(
    setting: Setting,
    by_hidden: PerturbedProduct,
    gates: Tensor,
    kept: Tensor,
    hidden: Tensor,
    grad_output: Tensor,
    grad_last: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients by what the input contributes to all steps, and by the initial states."""
    grad_a = torch.empty_like(gates)
    grad_states = [grad.to(gates.dtype, copy=True) for grad in grad_last]
    for step in setting.steps.order(not setting.backwards):
        at, active = step.at, [grad[: step.count] for grad in grad_states]
        active[0].add_(grad_output[at])
        setting.cell.retreat(gates[at], kept[at], hidden[at], active, grad_a[at])
        grad_u = setting.cell.grad_u(grad_a[at], gates[at])
        active[0].add_(by_hidden.transposed(grad_u.to(hidden.dtype), step.rows))
    return grad_a, grad_states


class _Grads(NamedTuple):
    """The gradients by the tensors of a `Weight`."""

    mean: Tensor | None
    bias: Tensor | None
    spread: Sequence[Tensor | None]


def _weight_grads(
    setting: Setting,
    weight: Weight,
    wanted: Any,
    product: PerturbedProduct,
    grad: Tensor,
    x: Tensor,
) -> _Grads:
    """The gradients by a weight, given input and gradient by the output of its products."""
    perturbation, mean, rows = setting.perturbation, weight.mean, setting.steps.all
    by_mean = by_bias = None
    by_spread: list[Tensor | None] = [None] * len(weight.spread)
    if wanted.bias:
        assert weight.bias is not None
        by_bias = grad.flatten(0, -2).sum(0).to(weight.bias.dtype)
    if wanted.mean:
        by_mean = weight_grad(grad, x).to(mean.dtype)
    if any(wanted.spread) or (wanted.mean and perturbation.depends_on_mean):
        for group, by_delta in enumerate(product.delta_grads(grad, x, rows)):
            assert weight.draw is not None
            seed = weight.draw.weight_seed(group)
            assert seed is not None  # only `_composed` goes without
            vjp = perturbation.vjp(mean, weight.spread, seed, by_delta.to(mean.dtype))
            by_mean = _add(by_mean, vjp[1])
            by_spread = [_add(*pair) for pair in zip(by_spread, vjp[2], strict=True)]
    return _Grads(by_mean, by_bias, by_spread)


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum, where None is zero."""
    if total is None or part is None:
        return part if total is None else total
    return total + part


def _composed(
    setting: Setting, x: Tensor, states: Sequence[Tensor], weights: Sequence[Weight]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same in torch's own operations, which torch can transform."""
    by_input, by_hidden = (_product(setting, weight, x.dtype) for weight in weights)
    dtype = torch.promote_types(x.dtype, torch.float32)
    a = by_input.apply(x, setting.steps.all).to(dtype)
    last = [state.to(dtype) for state in states]
    outputs = []
    for step in setting.steps.order(setting.backwards):
        active = [state[: step.count] for state in last]
        u = by_hidden.apply(active[0].to(x.dtype), step.rows)
        new = setting.cell.step(a[step.at], u.to(dtype), active)
        last = [
            torch.cat([part, state[step.count :]]) for part, state in zip(new, last, strict=True)
        ]
        outputs.append(new[0])
    output = setting.steps.join(outputs, setting.backwards).to(x.dtype)
    return output, tuple(state.to(x.dtype) for state in last)
