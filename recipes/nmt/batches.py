"""From encoded sentence pairs to batches of sentences that are about equally long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from recipes.nmt.vocabulary import BEGIN, END, PAD

LONG_LINE = 1000  # tokens
POOL = 100  # batches that are sorted by length together


class Pair(NamedTuple):
    """One encoded sentence pair.

    Attributes:
        line: number of the line in its file, from 0.
        source: numbers of the tokens, without special ones.
        target: likewise; empty in prediction, where it is not known.
    """

    line: int
    source: list[int]
    target: list[int]


class Batch(NamedTuple):
    """What a step gets. A column is a sentence, filled up with `PAD`.

    Attributes:
        source: int64, shape (source steps, batch): the tokens and `END`.
        source_lengths: with `END`, so that an empty line has length 1.
        target_inputs: int64, shape (target steps, batch): `BEGIN` and the tokens.
        targets: int64, shape (target steps, batch): the tokens and `END`.
        target_lengths: of `target_inputs` and `targets` alike.
        lines: numbers of the lines in their file, from 0.
    """

    source: Tensor
    source_lengths: tuple[int, ...]
    target_inputs: Tensor
    targets: Tensor
    target_lengths: tuple[int, ...]
    lines: tuple[int, ...]


def collate(pairs: Sequence[Pair]) -> Batch:
    """Put sentence pairs side by side, in the given order.

    Raises:
        ValueError: without any pair.
    """
    if not pairs:
        raise ValueError("A batch must hold at least one sentence pair, got none.")
    return Batch(
        source=columns([[*pair.source, END] for pair in pairs]),
        source_lengths=tuple(len(pair.source) + 1 for pair in pairs),
        target_inputs=columns([[BEGIN, *pair.target] for pair in pairs]),
        targets=columns([[*pair.target, END] for pair in pairs]),
        target_lengths=tuple(len(pair.target) + 1 for pair in pairs),
        lines=tuple(pair.line for pair in pairs),
    )


def select(batch: Batch, sentences: Sequence[int]) -> Batch:
    """Some sentences of a batch, by their columns, without padding that none of them needs."""
    wanted = list(sentences)
    source_lengths = tuple(batch.source_lengths[i] for i in wanted)
    target_lengths = tuple(batch.target_lengths[i] for i in wanted)
    source_steps, target_steps = max(source_lengths), max(target_lengths)
    return Batch(
        batch.source[:source_steps, wanted],
        source_lengths,
        batch.target_inputs[:target_steps, wanted],
        batch.targets[:target_steps, wanted],
        target_lengths,
        tuple(batch.lines[i] for i in wanted),
    )


def warn_of_long_lines(pairs: Sequence[Pair]) -> None:
    """Say which lines will take long to translate."""
    for pair in pairs:
        if len(pair.source) > LONG_LINE:
            rank_zero_warn(
                f"Line {pair.line + 1} has {len(pair.source):,} tokens. Time grows with the square "
                "of the length of a line: give one sentence per line."
            )


def parts(batch: Batch, padded_tokens: int) -> Iterator[Batch]:
    """A batch in parts that hold so many source tokens, padding included, or one sentence.

    So one very long sentence does not make all others of its batch as long.
    """
    order = sorted(range(len(batch.lines)), key=lambda i: batch.source_lengths[i])
    part: list[int] = []
    for sentence in order:
        if part and batch.source_lengths[sentence] * (len(part) + 1) > padded_tokens:
            yield select(batch, part)
            part = []
        part.append(sentence)
    yield select(batch, part)


def columns(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Sentences as columns filled up with `PAD`: int64, shape (longest length, sentences)."""
    rows = torch.full((len(sentences), max(map(len, sentences))), PAD, dtype=torch.int64)
    for row, sentence in zip(rows, sentences, strict=True):
        row[: len(sentence)] = torch.tensor(sentence, dtype=torch.int64)
    return rows.t().contiguous()


class BucketSampler:
    """Batches of similar length, of one of several processes.

    In training every epoch shuffles the sentences, sorts them by length within pools of 100
    batches, cuts the pools into batches and shuffles the batches. The order depends on `seed` and
    epoch alone. A batch is divided evenly among the processes, so that several of them together
    read the batches that one would read; only the fewer than `world_size` sentences that cannot be
    divided are left out, other ones in every epoch.

    In evaluation the sentences are sorted by length and none is left out or repeated. Each process
    has every `world_size`-th of them, in as many batches as the others have, because the
    synchronisation of metrics waits for all; where its share is smaller, its batches are. (If a
    share is one sentence, some batches have two.) With fewer sentences than processes some have
    no batch at all.

    Args:
        lengths: length of source and target of each sentence.
        batch_size: sentences of a batch, of all processes together.
        train: shuffle, as above, or else sort for evaluation.
        seed: of the shuffling.
        reshuffle: whether the order changes from epoch to epoch.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: in training, if `batch_size` cannot be divided by `world_size`, or if there are
            fewer sentences than processes.
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        reshuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if train and batch_size % world_size:
            raise ValueError(
                f"A batch of {batch_size} sentences cannot be divided evenly over {world_size} "
                f"processes. Use a batch size that is a multiple of {world_size}, or fewer "
                "processes."
            )
        if train and len(lengths) < world_size:
            raise ValueError(
                f"{len(lengths)} sentence pairs cannot be divided over {world_size} processes. Use "
                "more training text or fewer processes."
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.reshuffle = reshuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    @property
    def sampler(self) -> BucketSampler:
        """Itself: Lightning calls `set_epoch` of `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has."""
        self.epoch = epoch

    def __len__(self) -> int:
        sentences, processes = len(self.lengths), self.world_size
        if self.train:
            return math.ceil((sentences - sentences % processes) / self.batch_size)
        own = len(range(self.rank, sentences, processes))
        fewest, most = sentences // processes, math.ceil(sentences / processes)
        return min(math.ceil(most / math.ceil(self.batch_size / processes)), fewest or own)

    def __iter__(self) -> Iterator[list[int]]:
        """Places of the sentences of each batch in `lengths`."""
        if self.train:
            for batch in self._training_batches():
                yield batch[self.rank :: self.world_size]
            return
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        share = order[self.rank :: self.world_size]
        for number in range(len(self)):
            # as even as possible: the batches differ by one sentence at most
            start, end = (len(share) * n // len(self) for n in (number, number + 1))
            yield share[start:end]

    def _training_batches(self) -> list[list[int]]:
        """The batches of all processes in the order of this epoch."""
        epoch = self.epoch if self.reshuffle else 0
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        usable = len(self.lengths) // self.world_size * self.world_size
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[:usable]
        batches = []
        for start in range(0, usable, POOL * self.batch_size):
            pool = order[start : start + POOL * self.batch_size]
            pool.sort(key=self.lengths.__getitem__)
            batches += [
                pool[first : first + self.batch_size]
                for first in range(0, len(pool), self.batch_size)
            ]
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]


class Batches:
    """One pass over sentence pairs, batch by batch.

    A loader for Lightning, which leaves it as it is under DDP, since it is no `DataLoader`: the
    sampler divides the sentences among the processes itself. Its `state_dict` lets a run that was
    stopped within an epoch go on with the next batch.

    Args:
        pairs: all sentence pairs.
        sampler: which of them make up the batches of this process.
    """

    def __init__(self, pairs: Sequence[Pair], sampler: BucketSampler) -> None:
        self.pairs = pairs
        self.batch_sampler = sampler
        self._read = 0  # batches given out in the current pass
        self._stopped: dict[str, int] | None = None  # where a resumed run goes on

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
                yield collate([self.pairs[place] for place in places])

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many batches of its pass were read."""
        return {"epoch": self.batch_sampler.epoch, "read": self._read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """In that epoch begin the next pass after the batches that were read; later, anew."""
        self._stopped = dict(state)
