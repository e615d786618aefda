"""Perturbed layers, perturbations as users write them, and explicit weights of each example."""

import copy
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_revflip.flipout import FLIPOUT_LAYERS, NoiseSource, Perturbation, PerturbedLayer
from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.noise import LIBRARY, hashed_signs

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
"""For what only the compiled functions do; the torch path is tested everywhere."""


class Laplace(Perturbation):
    """A perturbation with parameters: Laplace noise and a spread that is learnt."""

    spread_names = ("log_std",)
    depends_on_mean = False

    def __init__(self, init_std: float = 0.1) -> None:
        self.init_std = init_std

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        sizes = torch.empty_like(like).exponential_(generator=generator)
        kind: Any = {"dtype": like.dtype, "device": like.device}
        signs = (torch.rand(like.shape, generator=generator, **kind) - 0.5).sign()
        return sizes * signs / math.sqrt(2)

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return spread[0].exp()

    def initial_spread(self, mean: Tensor) -> list[Tensor]:
        return [torch.full_like(mean, math.log(self.init_std))]


class UniformNoise(Perturbation):
    """One without parameters: uniform noise relative to the mean."""

    def __init__(self, std: float = 0.2) -> None:
        self.std = std

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        kind: Any = {"dtype": like.dtype, "device": like.device}
        return (torch.rand(like.shape, generator=generator, **kind) - 0.5) * math.sqrt(12)

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return self.std * mean


class TwoScales(Perturbation):
    """One whose scale is a sum, so that autograd gives both parts one and the same gradient."""

    spread_names = ("own", "common")

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        kind: Any = {"dtype": like.dtype, "device": like.device}
        return torch.randn(like.shape, generator=generator, **kind)

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return spread[0] + spread[1]

    def initial_spread(self, mean: Tensor) -> list[Tensor]:
        return [torch.full_like(mean, 0.1), torch.full_like(mean, 0.2)]


# --- layers and their draws -------------------------------------------------------------------


def perturbed_copy(plain: nn.Module, **arguments: Any) -> Any:
    """A flipout layer with copies of the parameters of a plain one."""
    layer = copy.deepcopy(plain)
    FLIPOUT_LAYERS[type(plain)].upgrade(layer, **arguments)
    return layer


def reseed(module: nn.Module, seed: int = 0) -> None:
    """Let the perturbed layers of a module start from a seed, each from one of its own."""
    for number, layer in enumerate(module.modules()):
        if isinstance(layer, PerturbedLayer):
            layer.noise_source = NoiseSource(torch.Generator().manual_seed(seed + 1000 * number))


def next_draw(layer: PerturbedLayer, name: str = "weight") -> Draw:
    """The draw of the next call of a layer that has a generator, without advancing it."""
    generator = layer.noise_source.generator
    assert generator is not None
    state = generator.get_state()
    draws = layer.draws()
    generator.set_state(state)
    assert draws is not None
    return draws[name]


@contextmanager
def torch_only() -> Iterator[None]:
    """Without the compiled functions, as where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REVFLIP_NATIVE", "0")
        LIBRARY.unload()
        yield
    LIBRARY.unload()


# --- explicit weights -------------------------------------------------------------------------


def explicit_weights(layer: Any, draw: Draw, examples: int, words: Tensor | None = None) -> Tensor:
    """W + dW_m * (r_n s_n^T) of each example by plain differentiable operations.

    Args:
        layer: linear, convolution or embedding.
        draw: its random numbers.
        examples: how many examples there are.
        words: the input of an embedding, examples first.
    """
    weights = []
    for number, group in enumerate(draw.groups(examples)):
        here = words[group] if words is not None and draw.signed else None
        delta = _delta(layer, draw.weight_seed(number), here)
        for example in range(*group.indices(examples)):
            signs = _signs(layer, draw, examples, example) if draw.signed else 1
            weights.append(layer.weight + delta * signs)
    return torch.stack(weights)


def _delta(layer: Any, seed: Any, words: Tensor | None) -> Tensor:
    """The dW of a seed; with `words`, noise is in their rows only."""
    perturbation, spread = layer.perturbation, layer.spread("weight")
    mean = layer.weight.detach()
    if words is None:
        noise = perturbation.unit_noise(mean, seed).clone()
    else:
        rows = words.unique()
        noise = torch.zeros_like(mean)
        noise[rows] = perturbation.unit_noise(mean[rows], seed)
    if getattr(layer, "padding_idx", None) is not None:
        noise[layer.padding_idx] = 0
    return perturbation.scale(layer.weight, *spread) * noise


def _signs(layer: Any, draw: Any, examples: int, example: int) -> Tensor:
    """The matrix r_n s_n^T in a shape that broadcasts over the weight."""
    weight = layer.weight
    first, second = weight.shape[:2]
    if isinstance(layer, nn.Embedding):
        rows = torch.arange(first)
        s = hashed_signs(draw.seed, torch.tensor(example), rows).to(weight.dtype)
        return s[:, None] * draw.output_signs(examples, second, weight)[example]
    groups = getattr(layer, "groups", 1)
    r = draw.output_signs(examples, first, weight)[example]
    s = draw.input_signs(examples, second * groups, weight)[example]
    # Output channels of group g of a convolution see the input channels of group g.
    s = s.view(groups, second).repeat_interleave(first // groups, dim=0)
    return (r[:, None] * s).view(first, second, *[1] * (weight.dim() - 2))


def explicit_output(plain: nn.Module, layer: Any, weights: Tensor, x: Tensor, dim: int) -> Tensor:
    """What the plain layer gives for each example, along `dim`, with its own weight."""
    bias = getattr(layer, "bias", None)
    outputs = []
    for example, weight in enumerate(weights):
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        outputs.append(functional_call(plain, parameters, (x.select(dim, example),)))
    return torch.stack(outputs, dim)
