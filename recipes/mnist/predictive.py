"""Class probabilities that several networks give the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def in_batches(
    predict: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Predict batch by batch, and bring the probabilities to the CPU.

    Args:
        predict: from images (batch, ...) to probabilities (networks, batch, classes).
        images: shape (number of images, ...).
        batch_size: images of a batch.
        device: where the networks are.

    Returns:
        Shape (networks, number of images, classes).
    """
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return torch.cat([predict(batch.to(device)).cpu() for batch in batches], dim=1)


@torch.no_grad()
def predict_network(module: nn.Module, images: Tensor) -> Tensor:
    """Probabilities of the network as it is, shape (1, batch, classes)."""
    return module(images).softmax(-1).unsqueeze(0)


@torch.no_grad()
def predict_dropout(module: nn.Module, images: Tensor, passes: int) -> Tensor:
    """Probabilities of passes that drop units as in training: Monte Carlo dropout.

    Gal and Ghahramani (2016), arXiv 1506.02142. Every image has units of its own dropped. Other
    layers, batch normalisation for example, compute as in evaluation.

    Returns:
        Shape (passes, batch, classes).

    Raises:
        ValueError: if the module has no dropout.
    """
    with dropping(module):
        return torch.stack([module(images).softmax(-1) for _ in range(passes)])


@contextmanager
def dropping(module: nn.Module) -> Iterator[None]:
    """In this context dropout layers drop units; all other ones compute as in evaluation."""
    modes = {part: part.training for part in module.modules()}
    dropout = [part for part in modes if isinstance(part, DROPOUT_LAYERS) and part.p > 0]
    if not dropout:
        raise ValueError(
            "Monte Carlo dropout needs a network with dropout, and this one has none. Train one "
            "with --model.dropout 0.5, for example, or predict with the network as it is."
        )
    module.eval()
    for layer in dropout:
        layer.train()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
