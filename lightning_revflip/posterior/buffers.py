"""Statistics of batch normalization for samples of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_revflip.posterior.layout import Parameters
from lightning_revflip.posterior.predict import check_samples, named_tensors


def reestimate_buffers(
    module: nn.Module,
    parameters: Parameters,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Parameters:
    """Statistics of batch normalization for each of `n` stacked samples.

    Samples drawn from a distribution have no running mean and variance of their own. Here they are
    the cumulative average over some batches in train mode, as `torch.optim.swa_utils.update_bn`
    computes it, but for all samples at once: each batch is read once. The module is left as it was.

    Args:
        module: computes with the samples.
        parameters: by name, shape (n, *shape).
        batches: training data, for example a DataLoader, on the module's device. Some thousand
            examples are enough.
        forward: how to call the module with a batch. None: with the batch, or its first entry if it
            is a tuple or list.

    Returns:
        `running_mean`, `running_var` and `num_batches_tracked` of each layer by name, shape
        (n, *shape), which `predict` takes together with the parameters.

    Raises:
        ValueError: for a module without such statistics, no batches, and samples that do not fit
            the module.

    Examples:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> samples = {"0.weight": torch.randn(20, 3, 4)}
        >>> buffers = reestimate_buffers(network, samples, [torch.randn(64, 4)])
        >>> buffers["1.running_mean"].shape
        torch.Size([20, 3])
        >>> from lightning_revflip.posterior import predict
        >>> predict(network, samples | buffers, torch.ones(8, 4)).shape
        torch.Size([20, 8, 3])
    """
    count = check_samples(module, parameters)
    own = named_tensors(module)
    samples = {
        name: value.to(own[name].device, own[name].dtype) for name, value in parameters.items()
    }
    # Every buffer is copied for each sample, as the forward pass may change any of them in place.
    buffers = {
        name: samples.pop(name, buffer.expand(count, *buffer.shape)).clone()
        for name, buffer in module.named_buffers()
    }
    statistics = _reset_statistics(module, buffers)
    call = _Call(module, forward or _call_with_inputs)
    read = 0
    with torch.no_grad(), _averaging(module):
        for batch in batches:
            read += 1
            for index in range(count):
                sample = {
                    f"module.{name}": value[index] for name, value in (samples | buffers).items()
                }
                functional_call(call, sample, (batch,))
    if read == 0:
        raise ValueError("batches must have at least one batch, got none.")
    return statistics


def _call_with_inputs(module: nn.Module, batch: Any) -> Any:
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


class _Call(nn.Module):
    """A module together with the way to call it."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.module, batch)


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that keep statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def _reset_statistics(module: nn.Module, buffers: Parameters) -> Parameters:
    """Set the stacked statistics to those of a new layer; returns them."""
    statistics: dict[str, Tensor] = {}
    for name in _layers(module):
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            full = f"{name}.{statistic}".lstrip(".")
            statistics[full] = buffers[full].fill_(1 if statistic == "running_var" else 0)
    if not statistics:
        raise ValueError(
            f"{type(module).__name__} has no batch normalization with running statistics, so there "
            "is nothing to re-estimate."
        )
    return statistics


@contextmanager
def _averaging(module: nn.Module) -> Iterator[None]:
    """Train mode, and layers that average over all batches; afterwards all is as before."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = [(layer, layer.momentum) for layer in _layers(module).values()]
    try:
        for part, _ in modes:
            part.training = True
        for layer, _ in momenta:
            layer.momentum = None
        yield
    finally:
        for part, training in modes:
            part.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum
