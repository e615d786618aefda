"""Many chains of a small network in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree


def log_mean_softmax(logits: Tensor) -> Tensor:
    """Logarithm of the mean of class probabilities.

    Its cross-entropy and its argmax are those of the ensemble.

    Args:
        logits: of S networks, shape (S, ..., classes).

    Returns:
        Shape (..., classes).

    Raises:
        ValueError: for a single class.
    """
    if logits.shape[-1] == 1:
        raise ValueError(
            f"logits must have the classes in the last dimension, got shape {tuple(logits.shape)} "
            "with a single one. For regression or binary logits give a function of your own that "
            "combines the outputs, such as lambda outputs: outputs.mean(0)."
        )
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


class ParallelChains(nn.Module):
    """Several copies of a network that are trained at once, each on its own part of every batch.

    The weights of the copies are stacked, and the forward pass is vectorised over them, which costs
    little more than one network while that is small.

    In training mode, a batch is divided into as many parts as there are chains, copy k sees part k,
    and the outputs come back in the order of the batch. So a training step that returns a mean over
    the batch needs no change. The gradients of each copy are those of the mean over its part:
    learning rates and samplers mean for each chain what they mean for a single network.

    In evaluation mode every copy sees the whole batch, and their outputs are combined.

    Args:
        module: the network; its outputs depend on each example alone, apart from normalisation over
            the batch, which then is over the part.
        num_chains: number of copies.
        reinitialize: whether copies have initial weights of their own, drawn by the method
            `reset_parameters` of the network's layers; else all start from those of `module`.
        combine: makes one output of those of the copies, (chains, batch, ...) to (batch, ...).

    Raises:
        ValueError: for fewer than 1 chain; in training, for a batch with fewer examples than that.
    """

    STACKED = "stacked"
    """Name of the submodule that holds the weights of all copies, stacked."""

    def __init__(
        self,
        module: nn.Module,
        num_chains: int,
        *,
        reinitialize: bool = True,
        combine: Callable[[Tensor], Tensor] = log_mean_softmax,
    ) -> None:
        super().__init__()
        if num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got {num_chains}.")
        self.num_chains = num_chains
        self.combine = combine
        copies = [module] + [copy.deepcopy(module) for _ in range(num_chains - 1)]
        if reinitialize:
            for each in copies[1:]:
                each.apply(_reset)
        self._single = (copy.deepcopy(module),)  # in a tuple: no submodule of this one
        self.stacked = copy.deepcopy(module)
        for name, param in self.stacked.named_parameters():
            param.data = torch.stack([each.get_parameter(name).detach() for each in copies])
        for name, buffer in self.stacked.named_buffers():
            buffer.data = torch.stack([each.get_buffer(name) for each in copies])

    def extra_repr(self) -> str:
        return f"num_chains={self.num_chains}"

    def network(self, chain: int) -> nn.Module:
        """A copy of the network with the weights of one chain.

        Args:
            chain: its number, from 0.
        """
        network = copy.deepcopy(self._single[0])
        for name, param in network.named_parameters():
            param.data = self.stacked.get_parameter(name).detach()[chain].clone()
        for name, buffer in network.named_buffers():
            buffer.data = self.stacked.get_buffer(name)[chain].clone()
        return network.train(self.training)

    def forward(self, *inputs: Tensor) -> Any:
        """Call all copies.

        Args:
            inputs: with a first dimension of the batch.

        Returns:
            What the network returns: tensors in lists, tuples or dicts.
        """
        if not self.training:
            return pytree.tree_map(self.combine, self._call(inputs, None, None))
        parts = Parts(len(inputs[0]), self.num_chains)
        outputs = self._call([parts.cut(each) for each in inputs], 0, parts.weights)
        return pytree.tree_map(parts.join, outputs)

    def _call(
        self, inputs: Sequence[Tensor], batch_dim: int | None, gradient_weights: Tensor | None
    ) -> Any:
        weights: dict[str, Tensor] = dict(self.stacked.named_parameters())
        if gradient_weights is not None:
            weights = {name: _weighted(each, gradient_weights) for name, each in weights.items()}

        def one(own: dict[str, Tensor], *inputs: Tensor) -> Any:
            return functional_call(self.stacked, own, inputs)

        in_dims = (0, *[batch_dim] * len(inputs))
        vectorised = torch.vmap(one, in_dims, randomness="different")
        return vectorised({**weights, **dict(self.stacked.named_buffers())}, *inputs)


class Parts:
    """How a batch is divided among chains.

    Parts that lack an example repeat their last one, of which the output is left out.

    Args:
        batch: number of examples.
        chains: number of parts, whose sizes differ by at most 1.

    Raises:
        ValueError: if a part would have no example.
    """

    def __init__(self, batch: int, chains: int) -> None:
        if batch < chains:
            raise ValueError(
                f"a batch of {batch} cannot be divided among {chains} chains, each of which needs "
                "an example. Use larger batches, or drop_last=True if only the last one is small."
            )
        sizes = torch.tensor([len(part) for part in torch.arange(batch).tensor_split(chains)])
        self.size = int(sizes.max())
        self.weights = batch / sizes
        """How many times smaller a mean over the batch counts examples than that over each part."""
        self._even = batch % chains == 0
        self._real = torch.arange(self.size) < sizes[:, None]
        self._places = self._real.flatten().cumsum(0).view(chains, self.size) - 1

    def cut(self, batch: Tensor) -> Tensor:
        """Shape (batch, ...) to (chains, size, ...)."""
        if self._even:
            return batch.reshape(-1, self.size, *batch.shape[1:])
        return batch[self._places.to(batch.device)]

    def join(self, outputs: Tensor) -> Tensor:
        """Shape (chains, size, ...) to (batch, ...), in the order of the batch."""
        if self._even:
            return outputs.flatten(0, 1)
        return outputs[self._real.to(outputs.device)]


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


class _WeightedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return grad * factors, None


def _weighted(weight: Tensor, factors: Tensor) -> Tensor:
    """A stacked weight whose gradient is multiplied by a factor for each chain."""
    shape = (-1, *[1] * (weight.dim() - 1))
    factors = factors.to(weight.device, weight.dtype).view(shape)
    weighted: Tensor = _WeightedGradient.apply(weight, factors)  # type: ignore[no-untyped-call]
    return weighted
