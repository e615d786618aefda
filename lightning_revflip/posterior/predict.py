"""Predictions of many samples of a module's parameters, without loading them into it one by one.

The samples are stacked, and `torch.func.vmap` computes a chunk of them as one batched network. That
saves the cost of launching each operation for each sample, which is most of the time where batches
are small. Where they are large, vmap gains nothing and its intermediate results fall out of the
processor's cache, so that samples are better computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_revflip.posterior.layout import Parameters

Transform = Callable[[Any], Tensor]
"""Makes a tensor of what a module returns for one sample."""

_CACHE_BYTES = 2**24
"""Intermediate results of a chunk on a CPU: about what its cache holds."""
_DEVICE_BYTES = 2**30
"""The same on a device that does not say how much memory is free."""
_LARGEST_CHUNK = 100
_SMALLEST_CHUNK = 4
"""A smaller chunk is slower than its samples one by one."""
_STREAMING_BYTES = 2**28
"""Parameters that are read at a time."""


def softmax(outputs: Tensor) -> Tensor:
    """Probabilities over the last dimension; float16 and bfloat16 become float32 before."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(-1)


def predict(
    module: nn.Module,
    parameters: Parameters,
    x: Any,
    *,
    chunk_size: int | None = None,
    transform: Transform | None = softmax,
) -> Tensor:
    """Predictions of `n` stacked samples of a module's parameters, without gradients.

    The module is in eval mode meanwhile, and otherwise left as it is. Samples may lie on another
    device or have another dtype than the module's own parameters: like `load_state_dict`, each
    chunk is converted to theirs.

    A module that vmap cannot run (nn.LSTM, control flow that depends on data, random numbers) is
    computed sample by sample, and so is any under autocast, which vmap heeds only in part. The
    first sample is always computed alone: errors of the module itself are raised there, and a
    RuntimeError thereafter means that vmap or the memory failed.

    Args:
        module: computes with the samples.
        parameters: by name, of shape (n, *shape): parameters and buffers of the module. Those that
            are missing are the module's own.
        x: what the module takes: a tensor or other single argument, or a tuple of its arguments.
        chunk_size: samples that are computed at a time, 1 for a loop without vmap. None: at most
            100, as many as keep the intermediate results in a CPU's cache (16 MiB), or take a
            quarter of another device's free memory.
        transform: makes a tensor of what the module returns for one sample; by default
            probabilities by a softmax over the last dimension. None: the outputs as they are.

    Returns:
        Shape (n, batch, classes), or (n, ...) of what `transform` returns.

    Raises:
        ValueError: for parameters that the module does not have, other shapes, different numbers
            of samples, and chunk_size below 1.
        TypeError: if the result for a sample is no tensor.

    Examples:
        >>> network = nn.Linear(4, 3)
        >>> samples = {"weight": torch.randn(20, 3, 4), "bias": torch.randn(20, 3)}
        >>> predict(network, samples, torch.ones(8, 4)).shape
        torch.Size([20, 8, 3])
    """
    return predict_chunks(module, [parameters], x, chunk_size=chunk_size, transform=transform)


def predict_chunks(
    module: nn.Module,
    chunks: Iterable[Parameters],
    x: Any,
    *,
    chunk_size: int | None = None,
    transform: Transform | None = softmax,
) -> Tensor:
    """As `predict`, of samples that come in several parts, of which one is in use at a time.

    Args:
        module: as for `predict`, like the arguments that are not named here.
        chunks: the parts, each as the `parameters` of `predict`.
        x: see there.
        chunk_size: see there.
        transform: see there.

    Raises:
        ValueError: as `predict`.
        TypeError: as `predict`.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    predictor = _Predictor(module, x, chunk_size, transform)
    with torch.no_grad(), evaluating(module):
        predictions = [part for parameters in chunks for part in predictor(parameters)]
    return torch.cat(predictions)


def streaming_size(numel: int) -> int:
    """How many samples of `numel` values to read at a time, so that they take some 256 MiB."""
    return max(1, min(_LARGEST_CHUNK, _STREAMING_BYTES // (4 * max(1, numel))))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All submodules in eval mode; afterwards each is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False  # not eval(), which some modules override to do more
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_samples(module: nn.Module, parameters: Parameters) -> int:
    """The number of samples of stacked parameters of a module.

    Raises:
        ValueError: if they do not fit the module, or differ in number.
    """
    own = named_tensors(module)
    if unknown := [name for name in parameters if name not in own]:
        raise ValueError(
            f"{type(module).__name__} has no parameter or buffer {', '.join(unknown)}; it has "
            f"{', '.join(own)}. Are the samples of another module, or of a part of this one?"
        )
    if not parameters:
        raise ValueError("parameters must hold at least one stacked parameter, got none.")
    count = next(iter(parameters.values())).shape[:1]
    for name, value in parameters.items():
        if value.dim() == 0 or value.shape[1:] != own[name].shape:
            shape = ", ".join(map(str, ("n", *own[name].shape)))
            raise ValueError(
                f"samples of {name} must have the shape ({shape}), got {tuple(value.shape)}. Are "
                "they of a network of another size?"
            )
        if value.shape[:1] != count or len(value) == 0:
            raise ValueError(
                f"{name} has {len(value)} samples and {next(iter(parameters))} has {count[0]}. All "
                "must have the same number, at least 1."
            )
    return count[0]


class _Predictor:
    """Predictions of one module for one input, of any number of samples."""

    def __init__(
        self, module: nn.Module, x: Any, chunk_size: int | None, transform: Transform | None
    ) -> None:
        self.module = module
        self.arguments = x if isinstance(x, tuple) else (x,)
        self.chunk_size = chunk_size
        self.transform = transform
        self.tensors = named_tensors(module)
        self.started = False

    def __call__(self, parameters: Parameters) -> Iterator[Tensor]:
        """Predictions in parts, of shape (k, ...)."""
        count, done = check_samples(self.module, parameters), 0
        if not self.started:
            yield self._first(self._sample(parameters, 0)).unsqueeze(0)
            self.started, done = True, 1
        while done < count:
            assert self.chunk_size is not None
            end = min(count, done + self.chunk_size)
            yield self._several(parameters, done, end)
            done = end

    def _first(self, sample: dict[str, Tensor]) -> Tensor:
        """The prediction of one sample, by which the size of chunks is chosen."""
        with _CountBytes() if self.chunk_size is None else nullcontext() as computed:
            output = self._one(sample)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the prediction of a sample must be a tensor, got {type(output).__name__}. Give a "
                "transform that makes a tensor of what the module returns."
            )
        if computed is not None:
            stored = sum(value.nbytes for value in sample.values())
            self.chunk_size = _automatic_size(output.device, stored, computed.nbytes)
        if torch.is_autocast_enabled(output.device.type):
            self.chunk_size = 1  # under vmap some operations, such as linear, ignore autocast
        return output

    def _several(self, parameters: Parameters, start: int, end: int) -> Tensor:
        """Predictions of some samples together, or one by one if vmap cannot run the module."""
        if end - start > 1:
            chunk = {name: self._own(name, value[start:end]) for name, value in parameters.items()}
            try:
                outputs: Tensor = vmap(self._one)(chunk)
                return outputs
            except RuntimeError:  # what vmap and a full memory raise
                self.chunk_size = 1
        samples = (self._sample(parameters, index) for index in range(start, end))
        return torch.stack([self._one(sample) for sample in samples])

    def _sample(self, parameters: Parameters, index: int) -> dict[str, Tensor]:
        return {name: self._own(name, value[index]) for name, value in parameters.items()}

    def _own(self, name: str, value: Tensor) -> Tensor:
        """Values where and how the module computes."""
        own = self.tensors[name]
        return value.to(own.device, own.dtype)

    def _one(self, sample: dict[str, Tensor]) -> Any:
        output = functional_call(self.module, sample, self.arguments)
        return output if self.transform is None else self.transform(output)


class _CountBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operations compute, without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = pytree.tree_leaves(output)
            self.nbytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return output


def _automatic_size(device: torch.device, stored: int, computed: int) -> int:
    """Samples of a chunk, from the bytes of one sample's parameters and intermediate results."""
    if device.type == "cpu":
        size = min(_CACHE_BYTES // max(1, computed), streaming_size(stored // 4))
    else:
        free = getattr(torch.get_device_module(device), "mem_get_info", None)
        budget = free(device)[0] // 4 if free is not None else _DEVICE_BYTES
        size = budget // max(1, stored + computed)
    size = min(size, _LARGEST_CHUNK)
    return size if size >= _SMALLEST_CHUNK else 1


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
