"""`Pool`: which of a fixed set of examples are labelled so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pool:
    """Examples by number, from 0 to `size - 1`, of which some are labelled.

    Args:
        size: number of examples.
        labelled: those that are labelled, in the order in which they were.

    Raises:
        ValueError: for examples that there are not, or that come twice.

    Examples:
        >>> pool = Pool(5, labelled=[3])
        >>> pool.label([0])
        >>> pool.labelled, pool.unlabelled
        (tensor([3, 0]), tensor([1, 2, 4]))
    """

    def __init__(self, size: int, labelled: Sequence[int] | Tensor = ()) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        self.size = size
        self._order: list[int] = []
        self._is_labelled = torch.zeros(size, dtype=torch.bool)
        self.label(labelled)

    @classmethod
    def balanced(cls, labels: Tensor, per_class: int, generator: torch.Generator) -> Pool:
        """A pool in which some examples of each class are labelled, drawn at random.

        Args:
            labels: classes of all examples, int64, shape (size,).
            per_class: number of examples of each class that occurs.
            generator: a CPU generator to draw from.

        Raises:
            ValueError: if a class has fewer examples.
        """
        drawn: list[int] = []
        for label in sorted(set(labels.tolist())):
            members = (labels == label).nonzero().squeeze(1).cpu()
            if len(members) < per_class:
                raise ValueError(
                    f"class {label} has {len(members)} examples, fewer than the {per_class} of "
                    "each class with which to start."
                )
            order = torch.randperm(len(members), generator=generator)
            drawn += members[order[:per_class]].tolist()
        return cls(len(labels), drawn)

    @property
    def labelled(self) -> Tensor:
        """The labelled examples in the order in which they were labelled, int64."""
        return torch.tensor(self._order, dtype=torch.int64)

    @property
    def unlabelled(self) -> Tensor:
        """The other examples in ascending order, int64."""
        return (~self._is_labelled).nonzero().squeeze(1)

    @property
    def num_unlabelled(self) -> int:
        """Number of examples that are not labelled."""
        return self.size - len(self._order)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Different examples without labels, drawn at random.

        Args:
            count: number of examples.
            generator: a CPU generator to draw from.

        Returns:
            int64, shape (count,).

        Raises:
            ValueError: if there are fewer.
        """
        self.check_remaining(count)
        order = torch.randperm(self.num_unlabelled, generator=generator)
        return self.unlabelled[order[:count]]

    def label(self, examples: Sequence[int] | Tensor) -> None:
        """Note that some more examples have labels.

        Args:
            examples: their numbers, in the order in which they were labelled.

        Raises:
            ValueError: for examples that there are not or that are labelled already, and for those
                that come twice; the pool stays as it was then.
        """
        numbers = [int(example) for example in examples]
        if wrong := [number for number in numbers if not 0 <= number < self.size]:
            raise ValueError(
                f"there is no example {wrong[0]} in a pool of {self.size}; they are numbered from "
                "0."
            )
        if again := [number for number in numbers if self._is_labelled[number]]:
            raise ValueError(f"example {again[0]} is labelled already.")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"an example cannot be labelled twice, got {numbers}.")
        self._order += numbers
        self._is_labelled[numbers] = True

    def check_remaining(self, count: int) -> None:
        """Raise unless so many examples are not labelled yet.

        Args:
            count: how many are to be labelled.

        Raises:
            ValueError: if there are fewer.
        """
        if count > self.num_unlabelled:
            raise ValueError(
                f"the pool runs out: {count} examples are to be labelled, but of {self.size} only "
                f"{self.num_unlabelled} are not labelled yet. Ask for fewer, or for fewer rounds."
            )

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Pool({self.size} examples, {len(self._order)} labelled)"
