"""Which members a population has, in which order, and which of them a process evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_revflip.flipout.evolution.settings import check_whole


class Segment(NamedTuple):
    """Neighbouring directions of one group, from `start` up to `stop`."""

    group: int
    start: int
    stop: int

    @property
    def directions(self) -> int:
        """How many there are."""
        return self.stop - self.start


@dataclass(frozen=True)
class Population:
    """Members by group; those of a group have one base perturbation.

    A direction is what a member is moved in. With antithetic pairs the first half of a group moves
    forwards in its directions and the second half backwards in the same ones.

    Args:
        size: number of members.
        groups: number of base perturbations.
        antithetic: whether each direction has two members.
        rank: number of this process.
        world_size: number of processes; each evaluates neighbouring directions, equally many.

    Raises:
        ValueError: if members cannot be divided so.
    """

    size: int
    groups: int = 1
    antithetic: bool = True
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name, value in {"population": self.size, "base_perturbations": self.groups}.items():
            check_whole(name, value)
        if self.size % (self.ways * self.groups):
            pairs = "antithetic pairs" if self.antithetic else "members"
            raise ValueError(
                f"a population of {self.size} cannot be divided into {self.groups} equal groups of "
                f"{pairs}, one for each of base_perturbations. Use a multiple of "
                f"{self.ways * self.groups}."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank must be at least 0 and below world_size, got {self.rank} of "
                f"{self.world_size}."
            )
        if self.directions % self.world_size:
            pairs = "antithetic pairs" if self.antithetic else "members"
            raise ValueError(
                f"{self.directions} {pairs} cannot be divided equally over {self.world_size} "
                f"processes. Use a population that is a multiple of {self.ways * self.world_size}."
            )

    @property
    def ways(self) -> int:
        """Members of each direction."""
        return 2 if self.antithetic else 1

    @property
    def directions(self) -> int:
        """Number of directions of all processes."""
        return self.size // self.ways

    @property
    def directions_of_group(self) -> int:
        """Number of directions that share a base perturbation."""
        return self.directions // self.groups

    @property
    def share(self) -> range:
        """Directions of this process, numbered over all groups."""
        count = self.directions // self.world_size
        return range(self.rank * count, (self.rank + 1) * count)

    @property
    def local_size(self) -> int:
        """Number of members of this process."""
        return self.size // self.world_size

    def segments(self) -> list[Segment]:
        """The directions of this process, group by group."""
        found = []
        for group in range(self.groups):
            first = group * self.directions_of_group
            start = max(self.share.start - first, 0)
            stop = min(self.share.stop - first, self.directions_of_group)
            if start < stop:
                found.append(Segment(group, start, stop))
        return found

    def member_numbers(self) -> Tensor:
        """Number in the population of each member of this process, int64, (local_size,).

        In the order in which the members lie in a batch: segment by segment, first those that move
        forwards.
        """
        numbers = []
        for segment in self.segments():
            first = self.ways * segment.group * self.directions_of_group
            forwards = torch.arange(segment.start, segment.stop) + first
            numbers += [forwards + way * self.directions_of_group for way in range(self.ways)]
        return torch.cat(numbers)

    def direction_numbers(self) -> Tensor:
        """Number of the direction of each member of this process, int64, as `member_numbers`."""
        numbers = [
            (torch.arange(start, stop) + group * self.directions_of_group).repeat(self.ways)
            for group, start, stop in self.segments()
        ]
        return torch.cat(numbers)

    def by_direction(self, values: Tensor) -> list[Tensor]:
        """Values of the members of this process, for each segment (ways, directions)."""
        sizes = [self.ways * segment.directions for segment in self.segments()]
        return [part.view(self.ways, -1) for part in torch.split(values, sizes)]
