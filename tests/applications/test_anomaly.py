"""Anomalies are told from the data as scikit-learn measures it, of equally many of both."""

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from lightning_revflip.applications import (
    Detection,
    NetworkPredictor,
    PosteriorPredictor,
    Predictor,
    detect_anomalies,
    detection,
)
from tests.helpers.applications import FixedSamples, images, network, samples_around

SCORES = ["predictive_entropy", "max_probability", "mutual_information", "variation_ratio"]


class Recorder(Predictor):
    """Notes what it is asked for, and answers with fixed probabilities."""

    def __init__(self, networks=1):
        super().__init__(nn.Identity())
        self.networks, self.seen = networks, []

    def logits(self, inputs):
        self.seen.append(inputs)
        yield torch.stack([inputs.flatten(1)[:, :3]] * self.networks)


def by_hand(probs):
    """Scores by the definitions, in numpy."""
    probs = probs.double().numpy()
    mean = probs.mean(0)
    entropy = -(mean * torch.tensor(mean).log().numpy()).sum(-1)
    expected = -(probs * torch.tensor(probs).log().numpy()).sum(-1).mean(0)
    return {
        "predictive_entropy": entropy,
        "max_probability": 1 - mean.max(-1),
        "mutual_information": entropy - expected,
    }


def test_detection_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    inside = (3 * torch.randn(5, 40, 4, generator=generator)).softmax(-1)
    outside = torch.randn(5, 30, 4, generator=generator).softmax(-1)
    found = detection(inside, outside)
    assert list(found) == SCORES
    is_out = [0] * 40 + [1] * 30
    both = torch.cat([inside, outside], dim=1)
    for name, scores in by_hand(both).items():
        assert found[name].auroc == pytest.approx(roc_auc_score(is_out, scores), abs=1e-6)
        precision = average_precision_score(is_out, scores)
        assert found[name].aupr_out == pytest.approx(precision, abs=1e-6)


def test_report_is_of_equally_many_of_both_sides_drawn_by_the_seed():
    data, _ = images(50)
    kinds = {"few": images(8, seed=1)[0], "many": images(90, seed=2)[0]}

    def run(seed):
        recorder = Recorder()
        report = detect_anomalies(recorder, data, kinds, size=20, seed=seed, batch_size=7)
        return report, torch.cat(recorder.seen)

    report, seen = run(seed=1)
    assert report.sizes == {"few": 8, "many": 20}
    assert len(seen) == 20 + 8 + 20
    drawn = seen[:20]
    rows = {tuple(image.flatten().tolist()) for image in data}
    assert len({tuple(image.flatten().tolist()) for image in drawn} & rows) == 20
    assert torch.equal(run(seed=1)[1], seen)
    assert not torch.equal(run(seed=2)[1], seen)
    # The 8 of the data that stand against the few anomalies.
    found = detection(probs_of(drawn[:8]), probs_of(seen[20:28]))
    assert report.detections["few"] == found


def probs_of(inputs):
    return inputs.flatten(1)[:, :3].softmax(-1).unsqueeze(0)


def test_scale_multiplies_both_sides():
    data, noise = images(12)[0], images(12, seed=1)[0]
    plain, scaled = Recorder(), Recorder()
    detect_anomalies(plain, data, {"noise": noise})
    report = detect_anomalies(scaled, data, {"noise": noise}, scale=5.0)
    torch.testing.assert_close(torch.cat(scaled.seen), 5 * torch.cat(plain.seen))
    assert report.scale == 5


def test_scores_of_several_networks_are_left_out_for_one():
    module, data, noise = network(), images(20)[0], {"noise": images(20, seed=1)[0]}
    alone = detect_anomalies(NetworkPredictor(module), data, noise)
    assert list(alone.detections["noise"]) == SCORES[:2]
    bank = PosteriorPredictor(FixedSamples(samples_around(module, 4)), module)
    several = detect_anomalies(bank, data, noise)
    assert (list(several.detections["noise"]), several.networks) == (SCORES, 4)


def test_anomalies_that_leave_a_network_undecided_are_told_without_error():
    """A linear network is certain of large inputs and undecided at 0."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    data = 10 * torch.where(torch.rand(30, 1, 2, 2) < 0.5, -1.0, 1.0)
    module[1].weight.data.copy_(torch.tensor([[1.0, 2, 4, 8], [-1, -2, -4, -8]]))
    report = detect_anomalies(NetworkPredictor(module), data, {"black": torch.zeros(30, 1, 2, 2)})
    assert report.detections["black"]["predictive_entropy"] == Detection(1.0, 1.0, 1.0, 0.0)
    assert report.metrics()["black/auroc/predictive_entropy"] == 1
    header, _, *rows = report.table().splitlines()
    assert header.split("|")[1].strip() == "anomalies"
    assert "".join(rows[0].split()) == "|black|predictive_entropy|100.0|100.0|100.0|0.0|"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size and batch_size must be at least 1, got 0"),
        ({"batch_size": 0}, "size and batch_size must be at least 1"),
        ({"scale": 0.0}, "scale must be a positive number, got 0"),
        ({"scale": float("nan")}, "scale must be a positive number"),
        ({"outside": {}}, "no kind of anomalies"),
        ({"outside": {"small": torch.rand(5, 1, 2, 2)}}, r"'small' .* \(5, 1, 2, 2\)"),
        ({"outside": {"none": torch.rand(0, 2, 6, 6)}}, r"'none' .* \(0, 2, 6, 6\)"),
    ],
    ids=["size", "batch_size", "scale", "nan", "nothing", "shape", "empty"],
)
def test_settings_that_make_no_sense_are_rejected(settings, message):
    settings = {"outside": {"noise": images(5)[0]}, **settings}
    with pytest.raises(ValueError, match=message):
        detect_anomalies(NetworkPredictor(network()), images(5)[0], **settings)


def test_diverged_network_is_named():
    module = network()
    module[-1].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="probs has NaN: did the model diverge"):
        detect_anomalies(NetworkPredictor(module), images(5)[0], {"noise": images(5)[0]})
