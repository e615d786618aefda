"""Numbers and figures of a prediction on test images and outliers, against scikit-learn."""

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import entropy
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from recipes.mnist.figures import entropy_figure, reliability, reliability_figure
from recipes.mnist.uncertainty import detection, quality, summary


def random_probs(networks: int, images: int, sharpness: float, seed: int = 0) -> torch.Tensor:
    """Probabilities of three classes, the more certain the sharper."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(networks, images, 3, generator=generator)).softmax(-1)


def labels(images: int) -> torch.Tensor:
    return torch.randint(3, (images,), generator=torch.Generator().manual_seed(9))


# --- quality ---------------------------------------------------------------------------------


def test_quality_is_that_of_the_mean_prediction():
    probs, truth = random_probs(4, 200, 2.0), labels(200)
    mean = probs.mean(0).numpy()
    found = quality(probs, truth)
    assert found["accuracy"].item() == (mean.argmax(1) == truth.numpy()).mean()
    assert found["nll"].item() == pytest.approx(log_loss(truth, mean), rel=1e-5)
    confidence, right = mean.max(1), mean.argmax(1) == truth.numpy()
    places = (confidence * 15).astype(int)
    expected = sum(abs(confidence[places == i].sum() - right[places == i].sum()) for i in range(15))
    assert found["ece"].item() == pytest.approx(expected / 200, rel=1e-5)


def test_class_that_is_ruled_out_costs_much_and_not_infinitely_much():
    probs = torch.tensor([[[1.0, 0.0, 0.0]]])
    nll = quality(probs, torch.tensor([1]))["nll"].item()
    assert nll == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


# --- outliers --------------------------------------------------------------------------------


def test_scores_tell_outliers_as_scikit_learn_says():
    test, outliers = random_probs(5, 60, 3.0), random_probs(5, 60, 1.0, seed=1)
    found = detection(test, outliers)
    both = torch.cat([test, outliers], dim=1).double()
    mean, is_out = both.mean(0), [0] * 60 + [1] * 60
    total = entropy(mean.numpy(), axis=-1)
    votes = both.argmax(-1)
    modal = votes.mode(0).values
    scores = {
        "predictive_entropy": total,
        "mutual_information": total - entropy(both.numpy(), axis=-1).mean(0),
        "max_probability": 1 - mean.max(-1).values.numpy(),
        "variation_ratio": (votes != modal).double().mean(0).numpy(),
    }
    assert len(found) == 4 * len(scores)
    for name, score in scores.items():
        auroc = roc_auc_score(is_out, score)
        assert found[f"auroc/{name}"].item() == pytest.approx(auroc, abs=1e-5)
        aupr_out = average_precision_score(is_out, score)
        assert found[f"aupr_out/{name}"].item() == pytest.approx(aupr_out, abs=1e-5)
    assert found["auroc/predictive_entropy"] > 0.6  # so the test tells high from low


def test_larger_set_is_thinned_evenly_to_the_size_of_the_smaller():
    test, outliers = random_probs(2, 90, 3.0), random_probs(2, 30, 1.0, seed=1)
    for found, expected in (
        (detection(test, outliers), detection(test[:, ::3], outliers)),
        (detection(outliers, test), detection(outliers, test[:, ::3])),
    ):
        assert found == expected


def test_one_network_has_no_scores_of_disagreement():
    found = summary(
        {"test": random_probs(1, 20, 3.0), "outliers": random_probs(1, 9, 1.0)}, labels(20)
    )
    assert not any("mutual_information" in name or "variation" in name for name in found)
    assert "auroc/predictive_entropy" in found
    assert "auroc/max_probability" in found


def test_summary_has_the_means_of_either_set():
    probs = {"test": random_probs(3, 20, 3.0), "outliers": random_probs(3, 9, 1.0)}
    found = summary(probs, labels(20))
    assert found["samples"] == 3
    for part, each in probs.items():
        total = entropy(each.double().mean(0).numpy(), axis=-1)
        expected = total - entropy(each.double().numpy(), axis=-1).mean(0)
        assert float(found[f"predictive_entropy_{part}"]) == pytest.approx(total.mean(), rel=1e-5)
        assert float(found[f"mutual_information_{part}"]) == pytest.approx(
            expected.mean(), rel=1e-4
        )


def test_without_outliers_there_is_nothing_to_detect():
    found = summary({"test": random_probs(3, 20, 3.0)}, labels(20))
    assert set(found) == {
        "samples",
        "accuracy",
        "nll",
        "ece",
        "predictive_entropy_test",
        "mutual_information_test",
    }


# --- figures ---------------------------------------------------------------------------------


def test_reliability_counts_each_image_once_and_agrees_with_the_calibration_error():
    probs, truth = random_probs(1, 300, 2.0), labels(300)
    found = reliability(probs[0], truth)
    assert found.share.sum().item() == pytest.approx(1)
    assert ((found.confidence * 15).floor() == torch.arange(15))[found.share > 0].all()
    error = (found.share * (found.accuracy - found.confidence).abs()).sum().item()
    assert error == pytest.approx(quality(probs, truth)["ece"].item(), rel=1e-5)


def test_reliability_of_certain_predictions_is_in_the_last_interval():
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = reliability(probs, torch.tensor([0, 1, 1, 0]), bins=4)
    assert found.share.tolist() == [0, 0, 0, 1]
    assert found.confidence.tolist() == [0, 0, 0, 1]
    assert found.accuracy.tolist() == [0, 0, 0, 0.75]


def test_reliability_figure_has_a_bar_for_each_interval():
    found = reliability(random_probs(1, 300, 2.0)[0], labels(300), bins=10)
    figure = reliability_figure(found)
    FigureCanvasAgg(figure).draw()
    upper, lower = figure.axes
    for axes, heights in ((upper, found.accuracy), (lower, found.share)):
        bars = axes.containers[0].patches
        assert [bar.get_height() for bar in bars] == pytest.approx(heights.tolist())
        assert [bar.get_x() for bar in bars] == pytest.approx([i / 10 for i in range(10)])


def test_entropy_figure_has_a_histogram_for_each_set():
    entropies = {
        "test": torch.tensor([0.0, 0.1, 0.1, math.log(3)]),
        "outliers": torch.full((5,), math.log(3) + 1e-7),
    }
    figure = entropy_figure(entropies, classes=3, bins=2)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    shares = {each.get_label(): each.get_data().values.tolist() for each in axes.patches}
    assert shares == {"test": [0.75, 0.25], "outliers": [0.0, 1.0]}
    assert axes.get_xlim() == pytest.approx((0, math.log(3)))
