"""The two classifiers as plain `nn.Sequential`, from images to logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


def mlp(inputs: int, hidden: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Fully connected layers with ReLU between them: 784-100-10 is `mlp(784, [100], 10)`.

    Args:
        inputs: number of pixels; images of any shape are flattened.
        hidden: units of each hidden layer; none makes a linear classifier.
        classes: number of classes.
        dropout: probability with which a hidden unit is dropped.

    Raises:
        ValueError: for sizes below 1.
    """
    check_sizes([inputs, *hidden, classes])
    return nn.Sequential(nn.Flatten(), *fully_connected([inputs, *hidden, classes], dropout))


def cnn(
    image_shape: Shape,
    classes: int,
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (1024,),
    dropout: float = 0.0,
) -> nn.Sequential:
    """Convolutions of 5x5 that keep the size, each with a ReLU and max-pooling of 2x2, then an MLP.

    Args:
        image_shape: channels, height and width of an image.
        classes: number of classes.
        channels: output channels of each convolution.
        hidden: units of each hidden layer behind them.
        dropout: probability with which a unit of these hidden layers is dropped.

    Raises:
        ValueError: for sizes below 1, or an image that is too small for so many poolings.
    """
    depth, height, width = image_shape
    check_sizes([*image_shape, *channels, *hidden, classes])
    pooled = (height >> len(channels), width >> len(channels))
    if min(pooled) < 1:
        raise ValueError(
            f"Images of {height}x{width} pixels cannot be halved {len(channels)} times. Use fewer "
            f"channels than {list(channels)}."
        )
    layers: list[nn.Module] = []
    for inputs, outputs in zip([depth, *channels[:-1]], channels, strict=True):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    features = channels[-1] * pooled[0] * pooled[1]
    sizes = [features, *hidden, classes]
    return nn.Sequential(*layers, nn.Flatten(), *fully_connected(sizes, dropout))


def fully_connected(sizes: Sequence[int], dropout: float) -> list[nn.Module]:
    """Linear layers from each size to the next, with ReLU and dropout, if any, between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return [*layers, nn.Linear(sizes[-2], sizes[-1])]


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise unless all sizes of a network are at least 1."""
    if min(sizes) < 1:
        raise ValueError(f"All sizes of a network must be at least 1, got {list(sizes)}.")
