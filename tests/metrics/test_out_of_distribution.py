"""Detection of examples out of the distribution is measured as scikit-learn measures it."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics import MetricCollection

from lightning_revflip.metrics import OutOfDistributionDetection


def expected(scores, is_out):
    """All values by scikit-learn."""
    scores, is_out = scores.double().numpy(), is_out.numpy()
    false, true, _ = roc_curve(~is_out, -scores, drop_intermediate=False)
    return {
        "auroc": roc_auc_score(is_out, scores),
        "aupr_in": average_precision_score(~is_out, -scores),
        "aupr_out": average_precision_score(is_out, scores),
        "fpr95": false[(true >= 0.95).argmax()],
    }


def computed(scores, is_out):
    metric = OutOfDistributionDetection()
    metric.update(scores, is_out)
    return {name: value.item() for name, value in metric.compute().items()}


@st.composite
def examples(draw):
    """Scores, many of them equal, of examples of both kinds."""
    count = draw(st.integers(2, 60))
    out = draw(st.integers(1, count - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    is_out = torch.arange(count)[torch.randperm(count, generator=generator)] < out
    scores = torch.randn(count, generator=generator) + draw(st.sampled_from([0, 1, 4])) * is_out
    return scores.round(decimals=draw(st.integers(0, 3))), is_out


@given(examples())
def test_values_are_those_of_scikit_learn(data):
    assert computed(*data) == pytest.approx(expected(*data), abs=1e-6)


@pytest.mark.parametrize("count", [20, 40, 100, 999])
def test_fpr95_lets_at_least_95_percent_of_the_distribution_pass(count):
    """The threshold is the score of the example in the distribution at that rank."""
    inside = torch.arange(count, dtype=torch.float32)
    passing = -(-95 * count // 100)  # rounded up
    threshold = inside[passing - 1]
    outside = torch.stack([threshold - 0.5, threshold, threshold + 0.5, threshold + 9])
    scores, is_out = torch.cat([inside, outside]), torch.arange(count + 4) >= count
    assert computed(scores, is_out)["fpr95"] == 0.5


def test_perfect_useless_and_inverted_scores():
    is_out = torch.tensor([False, False, False, True])
    perfect = computed(torch.tensor([0.0, 1, 2, 3]), is_out)
    assert perfect == {"auroc": 1, "aupr_in": 1, "aupr_out": 1, "fpr95": 0}
    useless = computed(torch.zeros(4), is_out)
    assert useless == {"auroc": 0.5, "aupr_in": 0.75, "aupr_out": 0.25, "fpr95": 1}
    inverted = computed(torch.tensor([1.0, 2, 3, 0]), is_out)
    assert inverted["auroc"] == 0
    assert inverted["fpr95"] == 1


def test_large_and_infinite_scores_keep_their_order():
    """Scores are no probabilities, and no sigmoid squeezes them."""
    scores = torch.tensor([-torch.inf, 100, 101, 102, torch.inf])
    is_out = torch.tensor([False, False, True, True, True])
    assert computed(scores, is_out)["auroc"] == 1


def test_batches_may_have_one_kind_each():
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(50, generator=generator), torch.randn(30, generator=generator)
    metric = OutOfDistributionDetection()
    metric.update(inside, torch.zeros(50, dtype=torch.bool))
    metric.update(outside, torch.ones(30, dtype=torch.bool))
    scores, is_out = torch.cat([inside, outside]), torch.arange(80) >= 50
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx(expected(scores, is_out), abs=1e-6)


def test_reset_forgets_and_pickling_keeps():
    metric = OutOfDistributionDetection()
    metric.update(torch.tensor([1.0, 2]), torch.tensor([False, True]))
    assert pickle.loads(pickle.dumps(metric)).compute()["auroc"] == 1
    metric.reset()
    metric.update(torch.tensor([2.0, 1]), torch.tensor([False, True]))
    assert metric.compute()["auroc"] == 0


def test_a_collection_has_the_values_of_each_score():
    scores = ("entropy", "information")
    metrics = MetricCollection(
        {name: OutOfDistributionDetection() for name in scores}, compute_groups=False
    )
    metrics["entropy"].update(torch.tensor([1.0, 2]), torch.tensor([False, True]))
    metrics["information"].update(torch.tensor([2.0, 1]), torch.tensor([False, True]))
    values = metrics.compute()
    assert (values["entropy_auroc"], values["information_auroc"]) == (1, 0)


@pytest.mark.parametrize("is_out", [True, False])
def test_examples_of_one_kind_are_refused(is_out):
    metric = OutOfDistributionDetection()
    metric.update(torch.tensor([1.0, 2]), torch.tensor([is_out, is_out]))
    with pytest.raises(ValueError, match="needs examples in and out of the distribution"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="got 0 in and 0 out"):
        OutOfDistributionDetection().compute()


@pytest.mark.parametrize(
    ("scores", "is_out", "message"),
    [
        (torch.ones(2), torch.ones(3).bool(), r"same shape \(N,\), got \(2,\) and \(3,\)"),
        (torch.ones(2, 1), torch.ones(2, 1).bool(), r"same shape \(N,\)"),
        (torch.ones(2), torch.ones(2), "is_out must be bool"),
        (torch.ones(2, dtype=torch.uint8), torch.ones(2).bool(), "must be floating-point"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([True, False]), "scores has NaN"),
    ],
    ids=["lengths", "dimensions", "is_out_dtype", "scores_dtype", "nan"],
)
def test_bad_input_is_refused(scores, is_out, message):
    with pytest.raises(ValueError, match=message):
        OutOfDistributionDetection().update(scores, is_out)
