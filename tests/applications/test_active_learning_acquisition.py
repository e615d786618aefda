"""Acquisition functions pick what their definitions say."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from lightning_revflip.applications import ACQUISITIONS, batch_bald
from lightning_revflip.applications.acquisition import highest
from lightning_revflip.posterior import mutual_information


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_probs(samples: int, candidates: int, classes: int, seed: int = 0) -> torch.Tensor:
    logits = 2 * torch.randn(samples, candidates, classes, generator=seeded(seed))
    return logits.double().softmax(-1)


def joint_information(probs: torch.Tensor, chosen: list[int]) -> float:
    """Mutual information of the labels of some candidates and the samples, by enumeration."""
    samples, _, classes = probs.shape
    joint, noise = [], 0.0
    for labels in product(range(classes), repeat=len(chosen)):
        each = torch.stack([probs[:, i, label] for i, label in zip(chosen, labels, strict=True)])
        joint.append(each.prod(0).mean().item())
    for i in chosen:
        noise += sum(entropy(probs[s, i].numpy()) for s in range(samples)) / samples
    return float(entropy(joint)) - noise


def greedy(probs: torch.Tensor, count: int) -> list[int]:
    """BatchBALD as it is defined: the candidate whose addition gives the most information."""
    chosen: list[int] = []
    for _ in range(count):
        rest = [i for i in range(probs.shape[1]) if i not in chosen]
        chosen.append(max(rest, key=lambda i: joint_information(probs, [*chosen, i])))
    return chosen


# --- scores ----------------------------------------------------------------------------------

SURE, UNSURE = [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]
OTHERWISE, THIRD = [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
KNOWN = torch.tensor(  # 3 samples, 4 candidates
    [
        [SURE, UNSURE, SURE, SURE],
        [SURE, UNSURE, OTHERWISE, SURE],
        [SURE, UNSURE, THIRD, OTHERWISE],
    ]
)


@pytest.mark.parametrize(
    ("name", "picked"),
    [("entropy", {1, 2}), ("bald", {2, 3}), ("variation_ratio", {2, 3})],
)
def test_picks_the_candidates_that_the_score_calls_uncertain(name, picked):
    assert set(ACQUISITIONS[name](KNOWN, 2, seeded()).tolist()) == picked


@given(
    scores=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_highest_scores_come_first(scores, share, seed):
    count = max(1, int(share * len(scores)))
    picked = highest(torch.tensor(scores, dtype=torch.float32), count, seeded(seed)).tolist()
    assert len(set(picked)) == count
    assert [scores[i] for i in picked] == sorted(scores, reverse=True)[:count]


def test_ties_are_broken_at_random():
    scores = torch.tensor([0.0, 1, 1, 1, 0])
    picks = torch.cat([highest(scores, 1, seeded(seed)) for seed in range(300)])
    # Binomial with mean 100 and standard deviation 8.2; 4 standard deviations
    assert ((picks.bincount(minlength=5)[1:4] - 100).abs() < 33).all()


def test_refuses_impossible_counts_and_scores_that_are_no_numbers():
    with pytest.raises(ValueError, match="cannot pick 4 of 3 candidates"):
        highest(torch.zeros(3), 4, seeded())
    with pytest.raises(ValueError, match="cannot pick 0"):
        batch_bald(random_probs(2, 3, 2), 0, seeded())
    with pytest.raises(ValueError, match="scores has NaN"):
        highest(torch.tensor([0.0, torch.nan]), 1, seeded())


# --- BatchBALD -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("samples", "candidates", "classes"), [(4, 5, 3), (7, 6, 2), (3, 5, 4)])
def test_batch_bald_is_greedy_on_the_joint_information(samples, candidates, classes, seed):
    probs = random_probs(samples, candidates, classes, seed)
    assert batch_bald(probs, 4, seeded()).tolist() == greedy(probs, 4)


def test_first_pick_of_batch_bald_is_that_of_bald():
    probs = random_probs(20, 50, 10)
    assert batch_bald(probs, 1, seeded()).item() == mutual_information(probs).argmax()


def test_batch_bald_does_not_pick_the_same_information_twice():
    # Candidates 0 and 1 are one question, of more information than candidate 2 has.
    yes, no = [0.95, 0.05], [0.05, 0.95]
    mild_yes, mild_no = [0.8, 0.2], [0.2, 0.8]
    probs = torch.tensor(
        [[yes, yes, mild_yes], [yes, yes, mild_no], [no, no, mild_yes], [no, no, mild_no]]
    )
    assert set(ACQUISITIONS["bald"](probs, 2, seeded()).tolist()) == {0, 1}
    assert 2 in batch_bald(probs, 2, seeded()).tolist()


def test_batch_bald_with_drawn_outcomes_is_close_to_the_best_batch():
    probs = random_probs(5, 8, 3)
    exact = joint_information(probs, greedy(probs, 5))
    drawn = [batch_bald(probs, 5, seeded(seed), max_outcomes=40).tolist() for seed in range(10)]
    found = [joint_information(probs, picks) for picks in drawn]
    assert all(len(set(picks)) == 5 for picks in drawn)
    # Batches at random have 0.8 of the information on average.
    assert min(found) > 0.95 * exact


def test_batch_bald_picks_all_candidates_if_asked_to():
    # Samples that are certain: most outcomes are impossible.
    probs = torch.eye(3, dtype=torch.float64)[torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]])]
    assert sorted(batch_bald(probs, 4, seeded()).tolist()) == [0, 1, 2, 3]
