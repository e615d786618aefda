"""`Pool`: every example is labelled once, and none is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.applications import Pool


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    size=st.integers(1, 40),
    steps=st.lists(st.integers(0, 10), max_size=8),
    seed=st.integers(0, 2**32),
)
def test_labelled_and_unlabelled_examples_are_always_a_partition_of_the_pool(size, steps, seed):
    pool, generator, order = Pool(size), seeded(seed), []
    for count in steps:
        if count > pool.num_unlabelled:
            with pytest.raises(ValueError, match="the pool runs out"):
                pool.draw(count, generator)
            continue
        drawn = pool.draw(count, generator)
        pool.label(drawn)
        order += drawn.tolist()
        assert pool.labelled.tolist() == order
        assert pool.num_unlabelled == size - len(order)
        assert sorted(order + pool.unlabelled.tolist()) == list(range(size))
    again = Pool(size, pool.labelled)
    assert again.unlabelled.equal(pool.unlabelled)


def test_draws_every_unlabelled_example_equally_often():
    pool, generator = Pool(6, [2, 4]), seeded()
    draws = torch.cat([pool.draw(2, generator) for _ in range(2000)]).bincount(minlength=6)
    assert draws[[2, 4]].tolist() == [0, 0]
    # Binomial with mean 1000 and standard deviation 22; 4 standard deviations
    assert ((draws[[0, 1, 3, 5]] - 1000).abs() < 90).all()


def test_balanced_pool_starts_with_some_of_each_class():
    labels = torch.tensor([7, 7, 7, 0, 0, 3, 3, 3, 3])
    pool = Pool.balanced(labels, 2, seeded())
    assert labels[pool.labelled].tolist() == [0, 0, 3, 3, 7, 7]
    assert not pool.labelled.equal(Pool.balanced(labels, 2, seeded(1)).labelled)
    with pytest.raises(ValueError, match="class 0 has 2 examples, fewer than the 3"):
        Pool.balanced(labels, 3, seeded())


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([1, 5], "no example 5 in a pool of 5"),
        ([-1], "no example -1"),
        ([1, 0], "example 0 is labelled already"),
        ([1, 1], "cannot be labelled twice"),
    ],
)
def test_refuses_impossible_labels_and_stays_as_it_was(examples, message):
    pool = Pool(5, [0])
    with pytest.raises(ValueError, match=message):
        pool.label(examples)
    assert pool.labelled.tolist() == [0]
    assert pool.unlabelled.tolist() == [1, 2, 3, 4]


def test_refuses_an_empty_pool():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Pool(0)
