"""Which images are for training, for validation and for the test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["last", "random"]

BALANCE = 2.0
"""How many times larger or smaller than overall the share of a class in a split may be."""


class Split(NamedTuple):
    """Places of the images of each part, int64, in rising order."""

    train: Tensor
    val: Tensor
    test: Tensor


def divide(
    labels: Tensor, first_test: int | None, val_size: int, test_size: int, rule: Rule, seed: int
) -> Split:
    """Divide images into training, validation and test.

    Args:
        labels: int64, shape (number of images,).
        first_test: where the test set begins; None draws one, and then `rule` is `random`.
        val_size: number of images for validation.
        test_size: number of images for the test, if it is drawn.
        rule: validate on the `last` images before the test set, or on `random` ones.
        seed: of what is drawn. Each class is drawn from in proportion to its size.

    Raises:
        ValueError: for an unknown rule, if there is nothing left to train on, or as for
            `check_balance`.
    """
    if rule not in ("last", "random"):
        raise ValueError(f"split must be 'last' or 'random', got {rule!r}.")
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(len(labels))
    if first_test is None:
        test, places = draw(places, labels, test_size, generator)
        rule = "random"
    else:
        places, test = places[:first_test], places[first_test:]
    if len(places) <= val_size:
        raise ValueError(
            f"{len(places):,} images cannot be divided into {val_size:,} for validation and some "
            "for training."
        )
    if rule == "last":
        train, val = places[:-val_size], places[-val_size:]
    else:
        val, train = draw(places, labels, val_size, generator)
    split = Split(train, val, test)
    check_balance(labels, split._asdict())
    return split


def draw(
    places: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw some of the images, of each class its share to within one image.

    The images are shuffled and put in the order of their classes; of these, `size` are taken at
    equal distances.

    Args:
        places: of the images to draw from, int64.
        labels: of all images.
        size: how many to draw.
        generator: of the shuffling.

    Returns:
        The places drawn and the other ones, both in rising order.
    """
    shuffled = places[torch.randperm(len(places), generator=generator)]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    taken_before = torch.arange(len(places) + 1) * size // len(places)
    taken = taken_before.diff() > 0
    return by_class[taken].sort().values, by_class[~taken].sort().values


def check_balance(labels: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Raise unless every part has about the same share of every class.

    It guards against copies of a data set whose images are sorted by class: there the last images
    are those of one or two classes.

    Args:
        labels: of all images, int64, classes from 0.
        parts: name and places of each part.

    Raises:
        ValueError: if a class is missing in a part, or its share there is more than `BALANCE`
            times larger or smaller than among all images.
    """
    overall = labels.bincount() / len(labels)
    for name, places in parts.items():
        share = labels[places].bincount(minlength=len(overall)) / len(places)
        ratio = share / overall
        wrong = ~((ratio >= 1 / BALANCE) & (ratio <= BALANCE))  # also where a class has no image
        if wrong.any():
            number = int(wrong.nonzero()[0])
            raise ValueError(
                f"Class {number} makes up {share[number]:.1%} of the {len(places):,} images of the "
                f"{name} part, but {overall[number]:.1%} of all. Are the files sorted by class? "
                "Use the original ones, or set --data.split random or a larger --data.train_size."
            )
