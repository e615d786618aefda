"""The random numbers of flipout layers while a Trainer fits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from lightning_revflip.flipout import NoiseSource
from lightning_revflip.flipout.noise import derive


class RecomputableNoise(NoiseSource):
    """Seeds from a private generator, the same ones again where a forward call is recomputed.

    Activation checkpointing and `ReversibleSequence` call layers again in the backward pass, and
    set torch's global generator to what it was. So a number of that generator tells which call this
    is; the seed itself does not depend on it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(generator)
        self._seeds: dict[int, int] = {}

    def forget(self) -> None:
        """Forget the calls so far: none of them is recomputed any more."""
        self._seeds.clear()

    def seed(self) -> int:
        call = int(torch.randint(2**62, ()))
        if call not in self._seeds:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "A flipout layer is called in the backward pass, but not with the random "
                    "numbers of a forward call of this batch, so its noise would be another one. "
                    "If this is activation checkpointing, use preserve_rng_state=True."
                )
            self._seeds[call] = super().seed()
        return self._seeds[call]

    # A copy goes on from here by itself.
    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._seeds = {}


def stream_seed(seed: int, rank: int) -> int:
    """The seed of the noise of one process, which differs between the processes of a run."""
    return derive(seed, rank)


def fresh_generator(rank: int) -> torch.Generator:
    """A generator for this process that follows from `seed_everything` or `torch.manual_seed`."""
    return torch.Generator().manual_seed(stream_seed(torch.initial_seed(), rank))


def states_of_all(generator: torch.Generator, processes: int) -> list[torch.Tensor]:
    """The states of the generators of all processes that train a model together."""
    own = generator.get_state()
    if processes == 1:
        return [own]
    # Lightning asks all processes for their state, though it writes that of the first alone.
    found: list[Any] = [None] * processes
    distributed.all_gather_object(found, own)
    return found


def resumed_generator(states: Sequence[torch.Tensor], rank: int) -> torch.Generator:
    """A generator that goes on from the saved state of this process.

    Args:
        states: of the processes that there were.
        rank: number of this process; a further one begins a stream that follows from the first.
    """
    generator = torch.Generator()
    generator.set_state(states[rank if rank < len(states) else 0].cpu())
    if rank < len(states):
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator().manual_seed(stream_seed(seed, rank))
