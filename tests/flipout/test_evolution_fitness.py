"""What the fitness of members counts."""

import pytest
import torch

from lightning_revflip.flipout.evolution.fitness import shape_fitness


def test_ranks_go_from_worst_to_best_and_ties_share_the_mean():
    fitness = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0])
    assert shape_fitness(fitness, "rank").tolist() == [0.25, -0.5, -0.125, -0.125, 0.5]
    assert shape_fitness(torch.zeros(4), "rank").tolist() == [0.0] * 4
    assert shape_fitness(torch.tensor([7.0]), "rank").tolist() == [0.0]


def test_standardized_fitness_has_mean_0_and_standard_deviation_1():
    torch.manual_seed(0)
    fitness = 1000 + 5 * torch.randn(50, dtype=torch.float64)
    shaped = shape_fitness(fitness, "standardized")
    assert float(shaped.mean()) == pytest.approx(0, abs=1e-9)
    assert float(shaped.std(correction=0)) == pytest.approx(1)
    torch.testing.assert_close(shaped * fitness.std(correction=0) + fitness.mean(), fitness)


def test_standardized_fitness_of_equals_is_0():
    assert shape_fitness(torch.full((7,), 0.1), "standardized").tolist() == [0.0] * 7


def test_none_is_the_fitness_itself():
    fitness = torch.tensor([1.0, -2.0])
    assert shape_fitness(fitness, "none").equal(fitness)
