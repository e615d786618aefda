"""Predictors give the probabilities of their networks, and gradients of the log of their mean."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_revflip.applications import (
    DropoutPredictor,
    NetworkPredictor,
    PosteriorPredictor,
    Predictor,
)
from lightning_revflip.applications.predictors import in_batches
from tests.helpers.applications import FixedSamples, images, network, samples_around
from tests.helpers.predictors import Tied, one_by_one


def mean_likelihood(module, samples, inputs, labels):
    """Log of the mean probability and its gradient, by autograd of one formula in float64."""
    module = module.double().eval()
    x = inputs.double().requires_grad_()
    count = len(next(iter(samples.values())))
    probs = [
        functional_call(module, {k: v[i].double() for k, v in samples.items()}, (x,)).softmax(-1)
        for i in range(count)
    ]
    value = torch.stack(probs).mean(0)[torch.arange(len(labels)), labels].log()
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


class Recurrent(nn.Module):
    """A network that vmap cannot run."""

    def __init__(self):
        super().__init__()
        self.rnn, self.read_out = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.read_out(self.rnn(x.flatten(1, 2))[0][:, -1])


@pytest.mark.parametrize("chunk_size", [1, 3, 25])
@pytest.mark.parametrize("make", [network, Recurrent], ids=["cnn", "lstm"])
def test_gradient_of_the_mean_is_that_of_an_explicit_loop(make, chunk_size):
    torch.manual_seed(0)
    module, (inputs, labels) = make(), images(8)
    samples = samples_around(module, 7)
    predictor = PosteriorPredictor(FixedSamples(samples), module, chunk_size=chunk_size)
    value, gradient = predictor.log_likelihood(inputs, labels)
    expected, slope = mean_likelihood(make(), samples, inputs, labels)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-5)


def linear(weights):
    module = nn.Linear(2, 3, bias=False)
    module.weight.data.copy_(torch.tensor(weights))
    return module


def test_gradient_of_an_ensemble_is_not_lost_where_probabilities_are_too_small():
    module = linear([[200.0, 0.0], [0.0, 50.0], [0.0, 0.0]])
    samples = {"weight": torch.stack([module.weight.detach(), 0.9 * module.weight.detach()])}
    predictor = PosteriorPredictor(FixedSamples(samples), module, chunk_size=1)
    value, gradient = predictor.log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    # p is exp(-200) and exp(-180), both 0 in float32. The second is exp(20) times the first.
    assert value.item() == pytest.approx(-180 - math.log(2), abs=1e-4)
    torch.testing.assert_close(gradient[0], torch.tensor([-180.0, 45.0]))


def test_gradient_of_a_confident_network_is_not_rounded_to_0():
    predictor = NetworkPredictor(linear([[50.0, 0.0], [0.0, 10.0], [0.0, 0.0]]))
    value, gradient = predictor.log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    # 1 - p = 2 exp(-50), half of it for each of the other classes.
    rest = math.exp(-50)
    assert value.item() == pytest.approx(-2 * rest, rel=1e-5)
    expected = torch.tensor([100.0, -10.0]) * rest
    torch.testing.assert_close(gradient[0], expected, rtol=1e-5, atol=0)


def test_probabilities_are_those_of_each_network():
    module, (inputs, _) = network(), images(8)
    samples = samples_around(module, 7)
    expected = one_by_one(module, samples, inputs).softmax(-1)
    found = PosteriorPredictor(FixedSamples(samples), module, chunk_size=3)(inputs)
    torch.testing.assert_close(found, expected)
    single = NetworkPredictor(module.eval())
    torch.testing.assert_close(single(inputs), module(inputs).softmax(-1).unsqueeze(0))
    parts = in_batches(single, inputs, 3)
    torch.testing.assert_close(parts, single(inputs))


def test_tied_weights_of_a_sample_stay_tied():
    module, inputs, labels = Tied(), torch.rand(5, 4), torch.tensor([0, 1, 2, 3, 0])
    samples = samples_around(module, 3)
    expected, _ = mean_likelihood(Tied(), samples, inputs, labels)
    for predictor in (
        PosteriorPredictor(FixedSamples(samples), module, chunk_size=2),
        NetworkPredictor(module),
    ):
        value, gradient = predictor.log_likelihood(inputs, labels)
        assert gradient.shape == inputs.shape
        if isinstance(predictor, PosteriorPredictor):
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_samples_are_drawn_once():
    class Counting(FixedSamples):
        drawn = 0

        def sample(self, n, generator=None):
            Counting.drawn += 1
            return super().sample(n, generator)

    module, (inputs, labels) = network(), images(4)
    predictor = PosteriorPredictor(Counting(samples_around(module, 5)), module, n=4)
    assert len(predictor(inputs)) == len(predictor(inputs)) == 4
    predictor.log_likelihood(inputs, labels)
    assert Counting.drawn == 1


def test_dropout_differs_between_passes_and_not_between_runs():
    module, (inputs, labels) = network(dropout=0.5), images(8)

    def run(seed):
        predictor = DropoutPredictor(module, passes=5, seed=seed)
        return predictor(inputs), predictor.log_likelihood(inputs, labels)[1]

    before = torch.get_rng_state()
    (probs, gradient), (same, same_gradient), (other, _) = run(1), run(1), run(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert probs.shape == (5, 8, 4)
    assert torch.equal(probs, same)
    assert torch.equal(gradient, same_gradient)
    assert not torch.equal(probs, other)
    assert not torch.equal(probs[0], probs[1])


def test_dropout_is_right_on_average():
    """Inverted dropout of a linear read-out has the mean of the network without dropout."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2, bias=False))
    logits = torch.cat([*DropoutPredictor(module, passes=4000).logits(torch.ones(1, 4))])
    expected = module.eval()(torch.ones(1, 4))
    # Each weight is dropped or doubled: its standard deviation is its size; 5 standard errors.
    spread = module[1].weight.norm(dim=1) / 4000**0.5
    assert ((logits.mean(0) - expected).abs() < 5 * spread).all()


def predictors():
    module = network(dropout=0.5)
    yield NetworkPredictor(module)
    yield DropoutPredictor(module, passes=2)
    yield PosteriorPredictor(FixedSamples(samples_around(module, 3)), module)


@pytest.mark.parametrize("predictor", [*predictors()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference_mode"])
def test_module_is_left_as_it_was(predictor: Predictor, inference):
    module = predictor.module.train()
    module[0].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    with torch.inference_mode(inference):
        inputs, labels = images(6)
        predictor(inputs)
        _, gradient = predictor.log_likelihood(inputs, labels)
    assert gradient.abs().sum() > 0
    assert not gradient.is_inference()
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_batch_normalization_computes_as_in_evaluation():
    """With the statistics of the batch, the other inputs would change a prediction."""
    module, (inputs, labels) = network(norm=True).train(), images(8)
    predictor = NetworkPredictor(module)
    torch.testing.assert_close(predictor(inputs)[:, :1], predictor(inputs[:1]))
    _, all_of_them = predictor.log_likelihood(inputs, labels)
    _, first = predictor.log_likelihood(inputs[:1], labels[:1])
    torch.testing.assert_close(all_of_them[:1], first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: PosteriorPredictor(FixedSamples(samples_around(m, 3)), m, 0), "n must be at"),
        (
            lambda m: PosteriorPredictor(FixedSamples(samples_around(m, 3)), m, chunk_size=0),
            "chunk_size must be at least 1, got 0",
        ),
        (
            lambda m: PosteriorPredictor(FixedSamples(samples_around(m, 3)), nn.Linear(2, 2)),
            "weight",
        ),
        (lambda m: DropoutPredictor(m, passes=3), "this one has none"),
        (lambda m: DropoutPredictor(network(dropout=0.5), passes=0), "passes must be at least 1"),
    ],
    ids=["n", "chunk_size", "architecture", "no dropout", "passes"],
)
def test_settings_that_make_no_sense_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make(network())


@pytest.mark.parametrize(
    ("module", "labels", "message"),
    [
        (nn.Flatten(0), [0, 1], r"logits of the shape \(batch, classes\), with a batch of 2"),
        (nn.Flatten(), [0, 99], "labels must be from 0 to 71, .* got 0 to 99"),
        (nn.Flatten(), [0], r"labels must be int64, of the shape \(2,\)"),
        (nn.Flatten(), [0.0, 1.0], "labels must be int64, .* got torch.float32"),
    ],
    ids=["no logits", "class", "number", "dtype"],
)
def test_what_cannot_be_attacked_is_named(module, labels, message):
    inputs, _ = images(2)
    with pytest.raises(ValueError, match=message):
        NetworkPredictor(module).log_likelihood(inputs, torch.tensor(labels))
