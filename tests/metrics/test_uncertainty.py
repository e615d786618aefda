"""Metrics of uncertainty are means over all examples of the functions of the same name."""

import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_revflip import posterior
from lightning_revflip.metrics import MutualInformation, PredictiveEntropy, VariationRatio

METRICS = {
    PredictiveEntropy: posterior.predictive_entropy,
    MutualInformation: posterior.mutual_information,
    VariationRatio: posterior.variation_ratio,
}
every_metric = pytest.mark.parametrize("metric_class", METRICS, ids=lambda kind: kind.__name__)


@pytest.fixture
def probs():
    return torch.randn(6, 50, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)


@every_metric
def test_value_is_the_mean_over_examples_of_all_batches(metric_class, probs):
    metric = metric_class()
    for batch in probs.split([30, 19, 1], dim=1):
        metric.update(batch)
    torch.testing.assert_close(metric.compute(), METRICS[metric_class](probs).mean())


@every_metric
def test_the_number_of_samples_may_change(metric_class, probs):
    metric = metric_class()
    metric.update(probs)
    metric.update(probs[:2])
    values = torch.cat([METRICS[metric_class](part) for part in (probs, probs[:2])])
    torch.testing.assert_close(metric.compute(), values.mean())


@every_metric
def test_forward_is_the_value_of_the_batch(metric_class, probs):
    metric = metric_class()
    metric.update(probs[:, :20])
    torch.testing.assert_close(metric(probs[:, 20:]), METRICS[metric_class](probs[:, 20:]).mean())
    torch.testing.assert_close(metric.compute(), METRICS[metric_class](probs).mean())


@every_metric
def test_reset_forgets_and_pickling_keeps(metric_class, probs):
    metric = metric_class()
    metric.update(probs[:, :20])
    kept = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(kept.compute(), metric.compute())
    metric.reset()
    metric.update(probs[:, 20:])
    torch.testing.assert_close(metric.compute(), METRICS[metric_class](probs[:, 20:]).mean())


def test_a_collection_computes_all(probs):
    metrics = MetricCollection([kind() for kind in METRICS], prefix="test/")
    metrics.update(probs)
    metrics.update(probs)
    values = metrics.compute()
    assert len(values) == len(METRICS)
    for kind, function in METRICS.items():
        torch.testing.assert_close(values[f"test/{kind.__name__}"], function(probs).mean())


@every_metric
def test_logits_are_refused(metric_class):
    with pytest.raises(ValueError, match="Are they logits"):
        metric_class().update(torch.randn(2, 3, 4))
