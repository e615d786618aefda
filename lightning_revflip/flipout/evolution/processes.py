"""What several processes, each with a share of the members, tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from lightning_revflip.flipout.evolution.population import Population


def gather_fitness(population: Population, fitness: Tensor, state: Sequence[int]) -> Tensor:
    """The fitness of all members, in the order of their numbers.

    Args:
        population: with the share of this process.
        fitness: of the members of this process, (local_size,).
        state: seed and generation, which must be the same in all processes.

    Raises:
        ValueError: if they are not.
    """
    if population.world_size == 1:
        return fitness
    own = fitness.new_tensor(state, dtype=torch.int64)
    states = [torch.empty_like(own) for _ in range(population.world_size)]
    distributed.all_gather(states, own)
    if any(not other.equal(own) for other in states):
        raise ValueError(
            "processes have different members: their (seed, generation) are "
            f"{[tuple(other.tolist()) for other in states]}. Give all of them the same seed."
        )
    parts = [torch.empty_like(fitness) for _ in range(population.world_size)]
    distributed.all_gather(parts, fitness.contiguous())
    everyone = fitness.new_empty(population.size)
    for rank, part in enumerate(parts):
        numbers = replace(population, rank=rank).member_numbers()
        everyone[numbers.to(part.device)] = part
    return everyone


def sum_over_processes(population: Population, totals: Sequence[Tensor]) -> None:
    """Sum tensors over processes, in place."""
    if population.world_size > 1:
        for total in totals:
            distributed.all_reduce(total)
