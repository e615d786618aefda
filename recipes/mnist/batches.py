"""Batches of images that lie in memory, divided among processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What a step gets.

    Attributes:
        images: float32, shape (batch, channels, height, width).
        labels: int64, shape (batch,).
    """

    images: Tensor
    labels: Tensor


class DividedSampler:
    """The images of each batch, of one of several processes.

    In training, each epoch has an order of its own that depends on `seed` and epoch alone. A batch
    is divided evenly among the processes, so that several of them together read the batches that
    one would read; only the fewer than `world_size` images that cannot be divided are left out,
    other ones in every epoch.

    In evaluation the images keep their order and none is left out or repeated. Each process has
    every `world_size`-th of them, in as many batches as the others have, because the
    synchronisation of metrics waits for all; where its share is smaller, its batches are. (If a
    share is one image, some batches have two.)

    Args:
        images: number of images.
        batch_size: images of a batch, of all processes together.
        train: shuffle, or keep the order for evaluation.
        seed: of the shuffling.
        reshuffle: whether the order changes from epoch to epoch.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: if `batch_size` cannot be divided by `world_size`, or if there are fewer images
            than processes.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        reshuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"A batch of {batch_size} images cannot be divided evenly over {world_size} "
                f"processes. Use a batch size that is a multiple of {world_size}, or fewer "
                "processes."
            )
        if images < world_size:
            raise ValueError(
                f"{images} images cannot be divided over {world_size} processes. Use more images "
                "or fewer processes."
            )
        self.images = images
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.reshuffle = reshuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    @property
    def sampler(self) -> DividedSampler:
        """Itself: Lightning calls `set_epoch` of `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        smallest_share = self.images // self.world_size
        if self.train:
            return math.ceil(smallest_share * self.world_size / self.batch_size)
        return min(math.ceil(self.images / self.batch_size), smallest_share)

    def __iter__(self) -> Iterator[Tensor]:
        """Places of the images of each batch, int64."""
        if self.train:
            epoch = self.epoch if self.reshuffle else 0
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            order = torch.randperm(self.images, generator=generator)
            usable = order[: self.images // self.world_size * self.world_size]
            share = usable[self.rank :: self.world_size]
            yield from share.split(self.batch_size // self.world_size)
        else:
            share = torch.arange(self.rank, self.images, self.world_size)
            yield from share.tensor_split(len(self))


class Batches:
    """One pass over images, batch by batch.

    A loader for Lightning, which leaves it as it is under DDP, since it is no `DataLoader`: the
    sampler divides the images among the processes itself. A batch is picked from a tensor at once,
    where a `DataLoader` would collect it image by image. Its `state_dict` lets a run that was
    stopped within an epoch go on with the next batch.

    Args:
        images: float32, shape (number of images, channels, height, width).
        labels: int64, shape (number of images,).
        sampler: which of them make up the batches of this process.
    """

    def __init__(self, images: Tensor, labels: Tensor, sampler: DividedSampler) -> None:
        self.images = images
        self.labels = labels
        self.batch_sampler = sampler
        self._read = 0  # batches given out in the current pass
        self._stopped: dict[str, int] | None = None  # where a resumed run goes on

    @property
    def dataset(self) -> Tensor:
        """All images, of all processes: callbacks ask a loader for the length of its `dataset`."""
        return self.images

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: it starts at the first batch, after Lightning has set the epoch.
        stopped, self._stopped = self._stopped, None
        first = 0
        if stopped is not None and stopped["epoch"] == self.batch_sampler.epoch:
            first = stopped["read"]
        self._read = 0
        for places in self.batch_sampler:
            self._read += 1
            if self._read > first:
                yield Batch(self.images[places], self.labels[places])

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many batches of its pass were read."""
        return {"epoch": self.batch_sampler.epoch, "read": self._read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """In that epoch begin the next pass after the batches that were read; later, anew."""
        self._stopped = dict(state)
