"""The perturbations of all members in one generation: drawn from a seed, and drawn again.

A member n of group m has, with its direction d and the way w = +1 or -1 in which it goes,

    matrices, kernels, tables    W + w * dW_m * (r_d s_d^T)      dW_m = sigma * e_m
    vectors                      b + w * sigma * e_d

where e is standard normal, and r and s are signs, one for each output and each input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_revflip.flipout.evolution.population import Population, Segment
from lightning_revflip.flipout.noise import derive, normal, signs

_BASE, _OUTPUTS, _INPUTS, _VECTOR = range(4)


@dataclass(frozen=True, eq=False)
class PerturbedParameter:
    """A parameter that differs from member to member.

    Attributes:
        name: in the model.
        number: by which its random numbers are told from others'.
        value: the parameter of the mean, by which members differ.
        inputs: number of input signs; 0 for a vector.
        blocks: groups of a convolution; each has its own inputs.
        still_row: a row that stays as it is: the padding of an embedding.
    """

    name: str
    number: int
    value: nn.Parameter
    inputs: int
    blocks: int = 1
    still_row: int | None = None


class PopulationNoise:
    """The perturbations of the members of this process.

    Args:
        population: which members these are.
        sigma: standard deviation.
        seed: of the generation.
        keep: hold what was drawn, instead of drawing it at every use.
    """

    def __init__(self, population: Population, sigma: float, seed: int, keep: bool = False) -> None:
        self.population = population
        self.segments = population.segments()
        self.sigma = sigma
        self._seed = seed
        self._kept: dict[tuple[int, int, int], Tensor] | None = {} if keep else None

    def base(self, parameter: PerturbedParameter, group: int) -> Tensor:
        """The dW of a group, in the shape of the parameter."""

        def draw(seed: int) -> Tensor:
            delta = normal(parameter.value.detach().contiguous(), seed).mul_(self.sigma)
            if parameter.still_row is not None:
                delta[parameter.still_row] = 0
            return delta

        return self._draw(_BASE, parameter, group, draw)

    def outputs(self, parameter: PerturbedParameter, segment: Segment) -> Tensor:
        """The r of some directions, (directions, outputs), as the parameter in dtype and device."""
        return self._signs(_OUTPUTS, parameter, segment, len(parameter.value))

    def inputs(self, parameter: PerturbedParameter, segment: Segment) -> Tensor:
        """The s of some directions, (directions, inputs)."""
        return self._signs(_INPUTS, parameter, segment, parameter.inputs)

    def vectors(self, parameter: PerturbedParameter, segment: Segment) -> Tensor:
        """What is added to a vector in some directions, (directions, size)."""

        def draw(seed: int) -> Tensor:
            shape = (self.population.directions_of_group, len(parameter.value))
            return normal(parameter.value.new_empty(shape), seed).mul_(self.sigma)

        drawn = self._draw(_VECTOR, parameter, segment.group, draw)
        return drawn[segment.start : segment.stop]

    def _signs(
        self, kind: int, parameter: PerturbedParameter, segment: Segment, size: int
    ) -> Tensor:
        # Of the whole group, so that members do not depend on how they are divided over processes.
        shape = (self.population.directions_of_group, size)
        value = parameter.value

        def draw(seed: int) -> Tensor:
            return signs(shape, seed, value.dtype, value.device)

        return self._draw(kind, parameter, segment.group, draw)[segment.start : segment.stop]

    def _draw(
        self,
        kind: int,
        parameter: PerturbedParameter,
        group: int,
        draw: Callable[[int], Tensor],
    ) -> Tensor:
        key = (kind, parameter.number, group)
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        with torch.no_grad():
            drawn = draw(derive(self._seed, *key))
        if self._kept is not None:
            self._kept[key] = drawn
        return drawn


def estimate(
    parameter: PerturbedParameter, noise: PopulationNoise, weights: Sequence[Tensor]
) -> Tensor:
    """Sum over the members of this process of weight times perturbation.

    For a matrix it is sum_m (R_m^T diag(F_m) S_m) * dW_m: one matrix product for each group.

    Args:
        parameter: of which.
        noise: the perturbations.
        weights: of the directions of each segment, (directions,); with antithetic pairs that of the
            member forwards less that of the member backwards.

    Returns:
        In shape and dtype of the parameter.
    """
    total = torch.zeros_like(parameter.value, memory_format=torch.contiguous_format)
    for segment, weight in zip(noise.segments, [w.to(total) for w in weights], strict=True):
        if not parameter.inputs:
            total += weight @ noise.vectors(parameter, segment)
            continue
        weighted = noise.outputs(parameter, segment) * weight.unsqueeze(1)
        product = _outer_products(weighted, noise.inputs(parameter, segment), parameter.blocks)
        product = product.view(*product.shape, *[1] * (total.dim() - 2))
        total.addcmul_(noise.base(parameter, segment.group), product)
    return total


def perturbation(parameter: PerturbedParameter, noise: PopulationNoise, place: int) -> Tensor:
    """What the member at a place of this process's batch adds to a parameter, in full."""
    ways = noise.population.ways
    for segment in noise.segments:
        if place >= ways * segment.directions:
            place -= ways * segment.directions
            continue
        way, direction = divmod(place, segment.directions)
        one = segment._replace(start=segment.start + direction, stop=segment.start + direction + 1)
        sign = 1 - 2 * way
        if not parameter.inputs:
            return sign * noise.vectors(parameter, one)[0]
        r, s = noise.outputs(parameter, one), noise.inputs(parameter, one)
        product = _outer_products(r, s, parameter.blocks)
        delta = noise.base(parameter, segment.group)
        return sign * delta * product.view(*product.shape, *[1] * (delta.dim() - 2))
    raise IndexError(f"no member at place {place} of this process.")


def _outer_products(outputs: Tensor, inputs: Tensor, blocks: int) -> Tensor:
    """Sum over directions of outputs times inputs, (outputs, inputs of a block)."""
    if blocks == 1:
        return outputs.t() @ inputs
    r, s = (torch.unflatten(part, 1, (blocks, -1)).movedim(0, 1) for part in (outputs, inputs))
    return (r.transpose(1, 2) @ s).flatten(0, 1)
