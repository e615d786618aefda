"""Measures of uncertainty are those of scipy, and of cases that are known."""

import math

import numpy
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.posterior import (
    expected_entropy,
    max_probability,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
    variation_ratio,
)

FUNCTIONS = (
    predictive_entropy,
    expected_entropy,
    mutual_information,
    variation_ratio,
    max_probability,
)
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@st.composite
def probabilities(draw, most_samples=6):
    """Rows of a softmax, from almost even to almost certain, of any floating-point dtype."""
    shape = draw(st.integers(1, most_samples)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-4, 1, 30]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return logits.softmax(-1).to(dtype)


def test_entropies_are_those_of_scipy():
    probs = torch.randn(6, 50, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    exact = probs.double().numpy()
    mean_entropy = scipy.stats.entropy(exact, axis=-1).mean(0)
    entropy_of_mean = scipy.stats.entropy(exact.mean(0), axis=-1)
    # float32 probabilities sum to 1 within 1e-7, and scipy divides by the sum.
    numpy.testing.assert_allclose(expected_entropy(probs), mean_entropy, atol=1e-6)
    numpy.testing.assert_allclose(predictive_entropy(probs), entropy_of_mean, atol=1e-6)
    numpy.testing.assert_allclose(
        mutual_information(probs), entropy_of_mean - mean_entropy, atol=1e-6
    )


def test_certain_samples_that_disagree():
    probs = torch.tensor([[[1.0, 0]], [[0, 1]], [[0, 1]], [[0, 1]]])
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert predictive_entropy(probs).item() == pytest.approx(entropy)
    assert expected_entropy(probs).item() == 0
    assert mutual_information(probs).item() == pytest.approx(entropy)
    assert variation_ratio(probs).item() == 0.25
    assert max_probability(probs).item() == 0.75


def test_even_samples_agree_on_not_knowing():
    probs = torch.full((3, 2, 4), 0.25)
    assert predictive_entropy(probs).tolist() == pytest.approx([math.log(4)] * 2)
    assert mutual_information(probs).tolist() == [0, 0]
    assert variation_ratio(probs).tolist() == [0, 0]  # all vote for the first class


def test_variation_ratio_counts_votes_for_the_modal_class():
    votes = torch.tensor([[0, 1, 1], [0, 2, 1], [2, 0, 1], [1, 2, 1], [0, 2, 1]])
    probs = torch.nn.functional.one_hot(votes).double() * 0.5 + 0.5 / 3
    modal = scipy.stats.mode(votes.numpy(), axis=0)
    assert variation_ratio(probs).tolist() == pytest.approx((1 - modal.count / 5).tolist())


def test_mutual_information_of_almost_equal_samples_is_accurate():
    """To second order it is the mean of sum_c (p_c - mean_c)^2 / (2 mean_c), here 4e-12."""
    shift = 1e-6
    probs = torch.tensor([[[0.5 + shift, 0.5 - shift]], [[0.5 - shift, 0.5 + shift]]])
    exact = probs.double()
    expected = ((exact - exact.mean(0)).square() / (2 * exact.mean(0))).sum(-1).mean(0)
    torch.testing.assert_close(mutual_information(probs.double()), expected, atol=0, rtol=1e-3)


@given(probabilities())
def test_mutual_information_is_between_0_and_the_predictive_entropy(probs):
    information, entropy = mutual_information(probs), predictive_entropy(probs)
    assert (information >= 0).all()
    assert (information <= entropy + 1e-6).all()
    slack = 0.1 if probs.dtype == torch.bfloat16 else 1e-5  # bfloat16 sums are off by up to 3 %
    assert (entropy <= math.log(probs.shape[2]) + slack).all()


@given(probabilities(), st.randoms(use_true_random=False))
def test_order_of_samples_and_classes_does_not_matter(probs, random):
    samples = random.sample(range(probs.shape[0]), probs.shape[0])
    for function in FUNCTIONS:
        torch.testing.assert_close(function(probs[samples]), function(probs), atol=1e-6, rtol=0)
    classes = random.sample(range(probs.shape[2]), probs.shape[2])
    for function in set(FUNCTIONS) - {variation_ratio}:  # whose votes may tie
        torch.testing.assert_close(function(probs[..., classes]), function(probs))


@given(probabilities(most_samples=1))
def test_one_sample_agrees_with_itself(probs):
    assert (mutual_information(probs) == 0).all()
    assert (variation_ratio(probs) == 0).all()


@every_function
def test_results_are_at_least_float32(function):
    probs = torch.full((3, 2, 4), 0.25)
    assert function(probs.bfloat16()).dtype == torch.float32
    assert function(probs.double()).dtype == torch.float64
    assert function(probs[:, :0]).shape == (0,)


@every_function
@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (torch.full((2, 4), 0.25), r"shape \(samples, examples, classes\).* got \(2, 4\)"),
        (torch.ones(0, 2, 4), r"at least one sample"),
        (torch.ones(2, 3, 1, dtype=torch.int64), "must be floating-point"),
        (torch.randn(2, 3, 4), "must sum to 1 .* Are they logits"),
        (torch.tensor([[[0.5, torch.nan]]]), "has NaN"),
        (torch.tensor([[[1.5, -0.5]]]), "must not be negative, got -0.5"),
    ],
    ids=["dimensions", "no_samples", "dtype", "logits", "nan", "negative"],
)
def test_what_is_no_probability_is_refused(function, probs, message):
    with pytest.raises(ValueError, match=message):
        function(probs)


def test_negative_log_likelihood_is_the_loss_of_the_mean_prediction():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(5, 8, 3, generator=generator).softmax(-1)
    labels = torch.arange(8) % 3
    expected = torch.nn.functional.nll_loss(probs.double().mean(0).log(), labels, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(probs, labels), expected)


def test_a_class_that_softmax_rounds_to_0_has_a_finite_likelihood():
    probs = torch.tensor([[[1.0, 0.0]]])
    smallest = numpy.finfo(numpy.float32).tiny
    assert negative_log_likelihood(probs, torch.tensor([1])).item() == -math.log(smallest)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 0]), "one for each of 2 examples"),
        (torch.tensor([0.0, 1.0]), "must be int64"),
        (torch.tensor([0, 2]), "from 0 to 1, got 0 to 2"),
        (torch.tensor([-1, 1]), "from 0 to 1, got -1 to 1"),
    ],
    ids=("too_many", "floats", "too_large", "negative"),
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(torch.full((3, 2, 2), 0.5), labels)
