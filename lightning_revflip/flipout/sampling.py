"""How flipout layers draw: `sampling` for a context, `sample_n` for several predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_revflip.flipout.layer import Mode, PerturbedLayer, Sampling
from lightning_revflip.flipout.noise import NoiseSource
from lightning_revflip.flipout.noise_checks import check_symmetric

_MODES = get_args(Mode)


@contextmanager
def sampling(
    model: nn.Module, mode: Mode = "flipout", generator: torch.Generator | None = None
) -> Iterator[None]:
    """Within the context flipout layers draw as told, whether or not the model trains.

    - `flipout`: each call draws, and each example gets pseudo-independent weights: for marginal
      predictions and their uncertainty.
    - `shared`: weights are drawn once, on entry, and hold for all examples and calls of the
      context: one network of the distribution, for joint predictions over a test set.
    - `mean`: no perturbation.

    Dropout and other layers stay as they are; call `model.eval()` first for predictions.

    Args:
        model: what holds the layers.
        mode: see above.
        generator: a CPU generator to draw from; None: torch's global one. Code under `torch.func`
            and `torch.compile` draws from torch's global generators anyway in mode `flipout`.

    Raises:
        ValueError: for an unknown mode, a model without flipout layers, a generator of another
            device, or noise that is not symmetric in mode `flipout`.

    Examples:
        >>> from lightning_revflip.flipout import FlipoutLinear
        >>> model, x = nn.Sequential(FlipoutLinear(4, 2)).eval(), torch.ones(3, 4)
        >>> with torch.no_grad(), sampling(model, "shared"):
        ...     bool((model(x)[0] == model(x)[1]).all())
        True
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}.")
    layers = flipout_layers(model)
    if mode == "flipout":
        for layer in layers:
            check_symmetric(layer.perturbation)  # a layer whose own estimator is another may not be
    source = NoiseSource(generator)
    before = [layer._sampling for layer in layers]
    # Encoder layers of torch compute without calling their parts where they think it is faster.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    seeds: dict[Tensor, int] = {}
    for layer in layers:
        own = {}
        if mode == "shared":
            for weight in layer.perturbed_weights():
                # Tied weights are the same in every place.
                if weight.mean not in seeds:
                    seeds[weight.mean] = source.seed()
                own[weight.name] = seeds[weight.mean]
        layer._sampling = Sampling(mode, source, own)
    torch.backends.mha.set_fastpath_enabled(fast_path and mode == "mean")
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for layer, previous in zip(layers, before, strict=True):
            layer._sampling = previous


def sample_n(
    model: nn.Module,
    *args: Any,
    n: int,
    mode: Mode = "shared",
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Any:
    """Outputs of `n` draws of the weights.

    Args:
        model: what holds the layers, usually in `eval()`.
        args: arguments of the model.
        n: number of draws.
        mode: `shared`, n networks, or `flipout`, see `sampling`.
        generator: a CPU generator to draw from; None: torch's global one.
        kwargs: arguments of the model by name.

    Returns:
        What the model returns, with a new first dimension of size n in every tensor; None stays.

    Raises:
        ValueError: for `n` below 1, outputs other than tensors, and as `sampling`.

    Examples:
        >>> from lightning_revflip.flipout import FlipoutLinear
        >>> sample_n(FlipoutLinear(4, 2).eval(), torch.ones(3, 4), n=5).shape
        torch.Size([5, 3, 2])
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    outputs = []
    for _ in range(n):
        with sampling(model, mode, generator):
            outputs.append(model(*args, **kwargs))
    return pytree.tree_map(_stacked, *outputs)


def _stacked(*parts: Any) -> Tensor | None:
    """One part of n outputs with a new first dimension; None stays None."""
    if all(part is None for part in parts):
        return None
    if not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"sample_n stacks tensors, and the model returns {type(parts[0]).__name__}. Call the "
            "model within `sampling` and keep its outputs yourself."
        )
    return torch.stack(parts)


def flipout_layers(model: nn.Module) -> list[PerturbedLayer]:
    """The flipout layers of a model.

    Raises:
        ValueError: if there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, PerturbedLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no flipout layers. Build it of FlipoutLinear and so on, "
            "or convert it: convert(model, FLIPOUT_LAYERS)."
        )
    return layers
