"""A linear map of perturbed weights as one `torch.autograd.Function`.

    y_n = map(x_n, W) + map(x_n * s_n, dW) * r_n + b

Noise and signs are drawn in the forward pass and drawn again in the backward pass; between the two
nothing is kept but the input and the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.linear_maps import LinearMap
from lightning_revflip.flipout.noise import composing
from lightning_revflip.flipout.perturbation_sample import check_first_derivative, sample
from lightning_revflip.flipout.perturbations import Perturbation, Spread

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)
"""What autocast converts."""


@dataclass(frozen=True)
class Setting:
    """What a call is told besides tensors."""

    map: LinearMap
    perturbation: Perturbation
    draw: Draw
    dtype: torch.dtype
    """Of input, output and the map; weights are converted."""


def perturbed_map(
    linear_map: LinearMap,
    perturbation: Perturbation,
    draw: Draw,
    x: Tensor,
    mean: Tensor,
    bias: Tensor | None,
    spread: Spread,
) -> Tensor:
    """The map of `x` with perturbed weights, under the present autocast state.

    Args:
        linear_map: the map.
        perturbation: of the weight.
        draw: its random numbers. Without signs, the perturbed weight W + dW is kept for the
            backward pass.
        x: input, examples first.
        mean: weight without perturbation.
        bias: added to the output; not perturbed.
        spread: parameters of the perturbation.
    """
    kind = x.device.type
    # Autocast leaves float64 and integers alone, which fail as in the plain layer if need be.
    autocast = torch.is_autocast_enabled(kind) and x.dtype in _AUTOCAST
    dtype = torch.get_autocast_dtype(kind) if autocast else mean.dtype
    setting = Setting(linear_map, perturbation, draw, dtype)
    x = x.to(dtype) if autocast else x
    with torch.autocast(kind, enabled=False):
        if not draw.signed:
            weight = mean + sample(perturbation, draw.weight_seed(0), mean, spread)
            return linear_map.apply(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if composing():
            return _composed(setting, x, mean, bias, spread)
        output: Tensor = PerturbedMap.apply(setting, x, mean, bias, *spread)  # type: ignore[no-untyped-call]
        return output


class PerturbedMap(torch.autograd.Function):
    """See `perturbed_map`; for draws with signs."""

    @staticmethod
    def forward(
        ctx: Any, setting: Setting, x: Tensor, mean: Tensor, bias: Tensor | None, *spread: Tensor
    ) -> Tensor:
        ctx.setting = setting
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, mean, *spread)
        apply, draw, dtype = setting.map.apply, setting.draw, setting.dtype
        output = apply(x, mean.to(dtype), None if bias is None else bias.to(dtype))
        s, r = _signs(setting, x, output)
        for number, group in enumerate(draw.groups(len(x))):
            delta = setting.perturbation.sample(mean, spread, _seed(draw, number)).to(dtype)
            for block in setting.map.blocks(x, group):
                output[block].addcmul_(apply(x[block] * s[block], delta), r[block])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        setting: Setting = ctx.setting
        x, mean, *spread = ctx.saved_tensors
        _, by_x, by_mean, by_bias, *by_spread = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            sums = _Gradients(setting, x, mean, spread, grad, by_x, by_mean, any(by_spread))
            for number, group in enumerate(setting.draw.groups(len(x))):
                sums.add(number, group)
            grad_bias = sums.finish(by_bias)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return None, sums.by_x, sums.by_mean, grad_bias, *sums.by_spread


class _Gradients:
    """Gradients by the input, the mean and the spread; None where they are not wanted."""

    def __init__(
        self,
        setting: Setting,
        x: Tensor,
        mean: Tensor,
        spread: Sequence[Tensor],
        grad: Tensor,
        by_x: bool,
        by_mean: bool,
        by_spread: bool,
    ) -> None:
        self._setting, self._x, self._mean, self._spread = setting, x, mean, spread
        self._grad, self._wants_mean = grad, by_mean
        self._wants_delta = by_spread or (by_mean and setting.perturbation.depends_on_mean)
        self._weight = mean.to(setting.dtype)
        self._s, self._r = _signs(setting, x, grad)
        self.by_x = setting.map.grads(grad, x, self._weight, by_x=by_x).x
        self.by_mean: Tensor | None = None
        self.by_spread: list[Tensor | None] = [None] * len(spread)

    def add(self, number: int, group: slice) -> None:
        """Add what goes through the perturbation of a group."""
        if self.by_x is None and not self._wants_delta:
            return
        blocks = self._setting.map.blocks(self._x, group)
        seed = _seed(self._setting.draw, number)
        if self._wants_delta and len(blocks) == 1:
            grad_delta = self._sweep(blocks, self._weight, by_x=False, by_weight=True)
            delta = self._add_weight_grads(seed, grad_delta).to(self._setting.dtype)
            self._sweep(blocks, delta, by_x=self.by_x is not None, by_weight=False)
            return
        # Weights are small beside inputs that come in blocks: they are drawn once more, so that
        # each block is visited once.
        delta = self._setting.perturbation.sample(self._mean, self._spread, seed)
        delta = delta.to(self._setting.dtype)
        wanted = {"by_x": self.by_x is not None, "by_weight": self._wants_delta}
        grad_delta = self._sweep(blocks, delta, **wanted)
        if grad_delta is not None:
            self._add_weight_grads(seed, grad_delta)

    def _sweep(
        self, blocks: Sequence[slice], weight: Tensor, *, by_x: bool, by_weight: bool
    ) -> Tensor | None:
        """Add the gradients by the input, and return that by the weight, where wanted."""
        grad_weight: Tensor | None = None
        if not by_x and not by_weight:
            return None
        for block in blocks:
            grads = self._grad[block] * self._r[block]
            inputs = self._x[block] * self._s[block] if by_weight else self._x[block]
            found = self._setting.map.grads(grads, inputs, weight, by_x=by_x, by_weight=by_weight)
            grad_weight = _add(grad_weight, found.weight)
            if found.x is not None:
                assert self.by_x is not None
                self.by_x[block].addcmul_(found.x, self._s[block])
        return grad_weight

    def finish(self, by_bias: bool) -> Tensor | None:
        """Add what goes through the mean weight, now that no dW takes memory any more.

        Returns:
            The gradient by the bias, if wanted.
        """
        found = self._setting.map.grads(
            self._grad, self._x, self._weight, by_weight=self._wants_mean, by_bias=by_bias
        )
        if found.weight is not None:
            self.by_mean = _add(found.weight.to(self._mean.dtype), self.by_mean)
        return found.bias

    def _add_weight_grads(self, seed: int, grad_delta: Tensor | None) -> Tensor:
        """Add the gradients by mean and spread; returns dW."""
        assert grad_delta is not None
        delta, by_mean, by_spread = self._setting.perturbation.vjp(
            self._mean, self._spread, seed, grad_delta.to(self._mean.dtype)
        )
        self.by_mean = _add(self.by_mean, by_mean if self._wants_mean else None)
        self.by_spread = [_add(*pair) for pair in zip(self.by_spread, by_spread, strict=True)]
        return delta


def _signs(setting: Setting, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The s and r in shapes that broadcast over input and output."""
    spread_out, features = setting.map.spread_out, setting.map.features
    s = setting.draw.input_signs(len(x), features(x), x)
    r = setting.draw.output_signs(len(output), features(output), output)
    assert s is not None
    assert r is not None
    return spread_out(s, x), spread_out(r, output)


def _seed(draw: Draw, group: int) -> int:
    seed = draw.weight_seed(group)
    assert seed is not None  # only `_composed` goes without
    return seed


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum, where None is zero; `total` may be changed."""
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


def _composed(
    setting: Setting, x: Tensor, mean: Tensor, bias: Tensor | None, spread: Spread
) -> Tensor:
    """The same in torch's own operations, nothing in place."""
    apply, draw, dtype = setting.map.apply, setting.draw, setting.dtype
    output = apply(x, mean.to(dtype), None if bias is None else bias.to(dtype))
    s, r = _signs(setting, x, output)
    parts = []
    for number, group in enumerate(draw.groups(len(x))):
        delta = sample(setting.perturbation, draw.weight_seed(number), mean, spread)
        parts.append(apply(x[group] * s[group], delta.to(dtype)))
    return output + torch.cat(parts) * r
