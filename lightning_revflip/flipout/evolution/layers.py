"""How plain layers compute with the weights of each member, which are never formed.

Rows of a batch belong to members: of n members each has rows / n neighbouring ones. With its signs
r and s, and its way w = +1 or -1,

    y = map(x, W) + w * map(x * s, dW) * r + b + w * db
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.flipout.conv import padded_input
from lightning_revflip.flipout.evolution.noise import PerturbedParameter, PopulationNoise
from lightning_revflip.flipout.evolution.rows import Rows
from lightning_revflip.flipout.linear_maps import Convolution, LinearMap, MatrixProduct

_NUMBERS_AT_ONCE = 2**18
"""Inputs that a CPU perturbs at once, which fit into its cache."""


class Use(NamedTuple):
    """How a layer uses a parameter; see `PerturbedParameter`."""

    inputs: int
    blocks: int = 1
    still_row: int | None = None


VECTOR = Use(0)

Perturbed = Mapping[str, PerturbedParameter]
"""By their names in the layer, the parameters that are perturbed."""


class MemberMap:
    """A linear map, prepared for the members of one generation.

    Args:
        noise: the perturbations.
        rows: which rows of a batch belong to which member.
        linear_map: the map.
        weight: its weight without perturbation.
        bias: added to the output; or None.
        perturbed_weight: how the weight is perturbed; None: not at all.
        perturbed_bias: the same for the bias.
        path: name of the layer, for errors.
    """

    def __init__(
        self,
        noise: PopulationNoise,
        rows: Rows,
        linear_map: LinearMap,
        weight: Tensor,
        bias: Tensor | None,
        perturbed_weight: PerturbedParameter | None,
        perturbed_bias: PerturbedParameter | None,
        path: str,
    ) -> None:
        self._noise = noise
        self._rows = rows
        self._map = linear_map
        self._weight = weight
        self._bias = bias
        self._path = path
        self._weight_parts = self._bias_parts = None
        if perturbed_weight is not None:
            self._weight_parts = [
                (
                    noise.base(perturbed_weight, segment.group),
                    noise.inputs(perturbed_weight, segment),
                    noise.outputs(perturbed_weight, segment),
                )
                for segment in noise.segments
            ]
        if perturbed_bias is not None:
            self._bias_parts = [
                noise.vectors(perturbed_bias, segment) for segment in noise.segments
            ]

    def __call__(self, x: Tensor) -> Tensor:
        """The map of (rows, ...) under the present autocast state."""
        rows = self._rows.of_member(x, self._path)
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        with torch.autocast(kind, enabled=False):
            return self._rows.mark(self._apply(x.to(dtype), rows))

    def _apply(self, x: Tensor, rows: int) -> Tensor:
        bias = None if self._bias is None else self._bias.to(x.dtype)
        output = self._map.apply(x, self._weight.to(x.dtype), bias)
        start = 0
        for number, segment in enumerate(self._noise.segments):
            for way in range(self._noise.population.ways):
                part = slice(start, start := start + segment.directions * rows)
                shape = (segment.directions, rows)
                y = torch.unflatten(output[part], 0, shape)
                sign = 1 - 2 * way
                if self._weight_parts is not None:
                    seen = torch.unflatten(x[part], 0, shape)
                    self._add_products(y, seen, *self._weight_parts[number], sign)
                if self._bias_parts is not None:
                    y.add_(self._spread_out(self._bias_parts[number], output), alpha=sign)
        return output

    def _add_products(
        self, y: Tensor, x: Tensor, delta: Tensor, s: Tensor, r: Tensor, sign: int
    ) -> None:
        """Add sign * map(x * s, dW) * r to `y`, some directions after the other."""
        delta, directions = delta.to(x.dtype), len(x)
        if x.device.type == "cpu":
            directions = max(1, directions * _NUMBERS_AT_ONCE // max(1, x.numel()))
        for start in range(0, len(x), directions):
            some = slice(start, start + directions)
            seen = x[some] * self._spread_out(s[some], x.flatten(0, 1))
            change = self._map.apply(seen.flatten(0, 1), delta)
            signs = self._spread_out(r[some], change)
            y[some].addcmul_(change.view_as(y[some]), signs, value=sign)

    def _spread_out(self, values: Tensor, x: Tensor) -> Tensor:
        """Numbers (directions, features) so that they broadcast over (directions, rows, ...)."""
        return self._map.spread_out(values.to(x.dtype), x).unsqueeze(1)


class MemberLayer(ABC):
    """What computes in place of a plain layer.

    Args:
        module: the layer.
        path: its name in the model.
        noise: the perturbations.
        rows: which rows of a batch belong to which member.
        perturbed: the parameters that are perturbed, by their names in the layer.
    """

    def __init__(
        self, module: Any, path: str, noise: PopulationNoise, rows: Rows, perturbed: Perturbed
    ) -> None:
        self.module = module
        self.path = path
        self.noise = noise
        self.rows = rows
        self.perturbed = perturbed

    @staticmethod
    @abstractmethod
    def uses(module: Any) -> dict[str, Use]:
        """How each parameter of a layer is used.

        Raises:
            ValueError: if it has a setting that is not supported.
        """

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the layer."""

    def map(self, linear_map: LinearMap, weight: str, bias: str | None) -> MemberMap:
        """A map with parameters of the layer."""
        return MemberMap(
            self.noise,
            self.rows,
            linear_map,
            getattr(self.module, weight),
            None if bias is None else getattr(self.module, bias),
            self.perturbed.get(weight),
            None if bias is None else self.perturbed.get(bias),
            self.path,
        )


class MemberLinear(MemberLayer):
    """nn.Linear on (rows, ..., in_features)."""

    @staticmethod
    def uses(module: nn.Linear) -> dict[str, Use]:
        return {"weight": Use(module.in_features), "bias": VECTOR}

    def __call__(self, input: Tensor) -> Tensor:
        if input.dim() < 2:
            raise ValueError(
                f"{self.path} needs rows of members first, (rows, ..., features), got shape "
                f"{tuple(input.shape)}."
            )
        return self.map(MatrixProduct(), "weight", "bias")(input)


class MemberConv(MemberLayer):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d on (rows, channels, *space)."""

    @staticmethod
    def uses(module: nn.modules.conv._ConvNd) -> dict[str, Use]:
        return {"weight": Use(module.in_channels, module.groups), "bias": VECTOR}

    def __call__(self, input: Tensor) -> Tensor:
        conv: nn.modules.conv._ConvNd = self.module
        space = len(conv.kernel_size)
        if input.dim() != space + 2:
            raise ValueError(
                f"{self.path} needs rows of members first, (rows, channels, {'space, ' * space})"
                f", got shape {tuple(input.shape)}."
            )
        input, padding = padded_input(conv, input)
        convolution = Convolution(conv.stride, padding, conv.dilation, conv.groups)
        return self.map(convolution, "weight", "bias")(input)


class MemberEmbedding(MemberLayer):
    """nn.Embedding on (rows, ...)."""

    @staticmethod
    def uses(module: nn.Embedding) -> dict[str, Use]:
        if module.max_norm is not None:
            raise ValueError("max_norm changes the table at each use; build it without")
        return {"weight": Use(module.embedding_dim, still_row=module.padding_idx)}

    def __call__(self, input: Tensor) -> Tensor:
        rows = self.rows.of_member(input, self.path)
        table = self.module.weight
        output = F.embedding(input, table)
        parameter = self.perturbed.get("weight")
        if parameter is None:
            return self.rows.mark(output)
        ways, start = self.noise.population.ways, 0
        for segment in self.noise.segments:
            directions = segment.directions
            part = slice(start, start := start + ways * directions * rows)
            words = input[part].reshape(ways, directions, -1)
            r = self.noise.outputs(parameter, segment).expand(ways, -1, -1).gather(2, words)
            s = self.noise.inputs(parameter, segment).unsqueeze(1)
            delta = F.embedding(words, self.noise.base(parameter, segment.group))
            delta.mul_(r.unsqueeze(-1)).mul_(s)
            if ways == 2:
                delta[1].neg_()
            output[part] += delta.view(output[part].shape)
        return self.rows.mark(output)
