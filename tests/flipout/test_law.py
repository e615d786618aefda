"""Over many calls: each example has the law of independent draws, and gradients are unbiased."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_revflip.flipout import DropConnect, Gaussian, MultiplicativeGaussian
from tests.helpers.flipout_layers import Laplace, UniformNoise, perturbed_copy, reseed
from tests.helpers.statistics import largest_distance, two_sample_distance

CALLS = 1500
PERTURBATIONS = [
    Gaussian(0.3),
    MultiplicativeGaussian(0.4),
    DropConnect(),
    Laplace(0.3),
    UniformNoise(0.4),
]
# Deviations are held against 5 standard errors; the distance of Kolmogorov and Smirnov against
# that which two samples of one law exceed once in a million. Seeds are fixed.


def layer_and_inputs(make, shape, **arguments):
    torch.manual_seed(0)
    plain = make()
    layer = perturbed_copy(plain, **arguments)
    reseed(layer)
    return plain, layer, torch.randn(shape)


def outputs_of_calls(layer, x, calls=CALLS):
    with torch.no_grad():
        return rounded(torch.stack([layer(x) for _ in range(calls)]))


def rounded(outputs):
    """To more digits than matter, so that equal values of a discrete law are equal."""
    return outputs.double().round(decimals=4)


def independent_outputs(plain, layer, x, count):
    """Outputs of one example `x` by weights that are drawn independently each time."""
    noise = layer.perturbation.noise(
        torch.empty(count, *plain.weight.shape), torch.Generator().manual_seed(99)
    )
    scale = layer.perturbation.scale(layer.weight, *layer.spread("weight"))
    with torch.no_grad():
        weights = plain.weight + scale * noise
        call = partial(torch.func.functional_call, plain)
        return rounded(torch.func.vmap(lambda weight: call({"weight": weight}, (x,)))(weights))


LAYERS = {
    "linear": (partial(nn.Linear, 4, 3), (3, 4)),
    "conv": (partial(nn.Conv1d, 2, 3, 2), (3, 2, 4)),
}
ESTIMATORS = [
    pytest.param({}, id="flipout"),
    pytest.param({"base_perturbations": 2}, id="two_bases"),
    pytest.param({"estimator": "shared"}, id="shared"),
]


CASES = [
    *(("linear", {}, perturbation) for perturbation in PERTURBATIONS),
    ("linear", {"base_perturbations": 2}, PERTURBATIONS[0]),
    ("linear", {"estimator": "shared"}, PERTURBATIONS[0]),
    ("conv", {}, PERTURBATIONS[0]),
    ("conv", {"base_perturbations": 2}, PERTURBATIONS[2]),
]


@pytest.mark.parametrize(("name", "arguments", "perturbation"), CASES, ids=str)
def test_output_of_an_example_has_the_law_of_independent_draws(name, arguments, perturbation):
    make, shape = LAYERS[name]
    plain, layer, x = layer_and_inputs(make, shape, perturbation=perturbation, **arguments)
    outputs = outputs_of_calls(layer, x)
    for example in (0, 2):
        found = outputs[:, example].flatten(1)
        expected = independent_outputs(plain, layer, x[example], 4 * CALLS).flatten(1)
        for unit in range(0, found.shape[1], 2):
            distance = two_sample_distance(found[:, unit], expected[:, unit])
            assert distance < largest_distance(CALLS, 4 * CALLS)
        assert_moments_agree(found, expected)


def assert_moments_agree(found, expected):
    """Means, covariances between units, and fourth powers."""
    center = expected.mean(0)
    for statistic in (
        lambda y: y - center,
        lambda y: ((y - center)[:, :, None] * (y - center)[:, None, :]).flatten(1),
        lambda y: (y - center) ** 4,
    ):
        parts = statistic(found), statistic(expected)
        error = sum(part.var(0) / len(part) for part in parts).sqrt()
        difference = (parts[0].mean(0) - parts[1].mean(0)).abs()
        assert bool((difference < 5 * error + 1e-9).all())


@pytest.mark.parametrize("perturbation", PERTURBATIONS[:2], ids=repr)
def test_local_reparameterization_has_the_law_of_independent_draws(perturbation):
    make, shape = LAYERS["linear"]
    plain, layer, x = layer_and_inputs(
        make, shape, perturbation=perturbation, estimator="local_reparameterization"
    )
    found = outputs_of_calls(layer, x)[:, 1]
    expected = independent_outputs(plain, layer, x[1], 4 * CALLS)
    assert_moments_agree(found, expected)
    for unit in range(3):
        distance = two_sample_distance(found[:, unit], expected[:, unit])
        assert distance < largest_distance(CALLS, 4 * CALLS)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
def test_examples_are_uncorrelated_by_flipout_and_alike_by_shared(perturbation):
    make, shape = LAYERS["linear"]
    for estimator in ("flipout", "shared"):
        _, layer, x = layer_and_inputs(make, shape, perturbation=perturbation, estimator=estimator)
        outputs = outputs_of_calls(layer, x[:1].expand(3, 4))  # the same example three times
        noise = outputs - outputs.mean(0)
        correlation = (noise[:, 0] * noise[:, 1]).mean(0) / noise[:, 0].square().mean(0)
        if estimator == "shared":
            torch.testing.assert_close(correlation, torch.ones(3, dtype=torch.float64))
        else:
            # Products of fourth moments up to 10 (Laplace) widen the error by at most 3.
            assert bool((correlation.abs() < 3 * 5 / math.sqrt(CALLS)).all())


def test_embedding_has_the_law_of_independent_draws_and_uncorrelated_examples():
    torch.manual_seed(0)
    plain = nn.Embedding(5, 2)
    layer = perturbed_copy(plain, perturbation=Gaussian(0.3))
    reseed(layer)
    outputs = outputs_of_calls(layer, torch.tensor([[3, 1, 3], [1, 3, 3]]))
    noise = (outputs - plain.weight[torch.tensor([[3, 1, 3], [1, 3, 3]])].detach()) / 0.3
    assert float((noise.square().mean(0) - 1).abs().max()) < 5 * math.sqrt(2 / CALLS)
    fourth = (noise**4).mean(0)
    assert float((fourth - 3).abs().max()) < 5 * math.sqrt(96 / CALLS)
    error = 5 * math.sqrt(3 / CALLS)
    between_examples = (noise[:, 0, 0] * noise[:, 1, 1]).mean(0)  # word 3 in both
    between_words = (noise[:, 0, 0] * noise[:, 0, 1]).mean(0)
    between_features = (noise[..., 0] * noise[..., 1]).mean(0)
    for covariance in (between_examples, between_words, between_features):
        assert float(covariance.abs().max()) < error


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_uncorrelated_noise_averages_out_over_a_batch(batch):
    # The variance of the mean over a batch of equal examples falls as 1 / batch, as if independent.
    _, layer, _ = layer_and_inputs(partial(nn.Linear, 4, 3), (1, 4), perturbation=Gaussian(0.3))
    x = torch.ones(batch, 4)
    variance = outputs_of_calls(layer, x).mean(1).var(0)
    expected = 4 * 0.3**2 / batch
    assert bool(((variance / expected - 1).abs() < 5 * math.sqrt(3 / CALLS)).all())


# --- gradients --------------------------------------------------------------------------------


def quadratic_gradients(layer, x):
    """Exact expectation of the gradients of half the squared outputs, by formula."""
    weight, rho = layer.weight, layer.weight_rho
    output = F.linear(x, weight, layer.bias)
    std = F.softplus(rho)
    moments = x.square().sum(0) * torch.ones_like(rho)
    return {
        "weight": output.T @ x,
        "bias": output.sum(0),
        "weight_rho": std * moments * rho.sigmoid(),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        *ESTIMATORS,
        pytest.param({"estimator": "local_reparameterization"}, id="local_reparameterization"),
    ],
)
def test_gradients_are_unbiased(arguments):
    make, shape = LAYERS["linear"]
    _, layer, x = layer_and_inputs(make, shape, perturbation=Gaussian(0.3), **arguments)
    names = [name for name, _ in layer.named_parameters()]
    samples = {name: [] for name in names}
    for _ in range(CALLS):
        loss = 0.5 * layer(x).square().sum()
        for name, grad in zip(names, torch.autograd.grad(loss, layer.parameters()), strict=True):
            samples[name].append(grad)
    for name, expected in quadratic_gradients(layer, x).items():
        found = torch.stack(samples[name])
        error = found.std(0) / math.sqrt(CALLS)
        assert bool(((found.mean(0) - expected).abs() < 5 * error).all()), name


def test_gradients_of_multiplicative_noise_reach_the_mean_through_both():
    # E 1/2 |y|^2 = 1/2 |mean output|^2 + 1/2 sum std^2 W^2 x^2
    make, shape = LAYERS["linear"]
    _, layer, x = layer_and_inputs(make, shape, perturbation=MultiplicativeGaussian(0.5))
    losses = (0.5 * layer(x).square().sum() for _ in range(CALLS))
    found = torch.stack([torch.autograd.grad(loss, layer.weight)[0] for loss in losses])
    output = F.linear(x, layer.weight, layer.bias)
    expected = output.T @ x + 0.25 * layer.weight * x.square().sum(0)
    error = found.std(0) / math.sqrt(CALLS)
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())


def test_flipout_has_the_gradient_variance_of_independent_draws_where_shared_has_more():
    # In the paper's terms: variance of mean-gradients alpha / N, for N equal examples.
    variances = {}
    for estimator in ("flipout", "shared"):
        for batch in (1, 16):
            make, _ = LAYERS["linear"]
            _, layer, _ = layer_and_inputs(
                make, (1, 4), perturbation=Gaussian(0.3), estimator=estimator
            )
            x = torch.ones(batch, 4)
            grads = [
                torch.autograd.grad(layer(x).square().sum(1).mean(), layer.weight)[0]
                for _ in range(1000)
            ]
            variances[estimator, batch] = float(torch.stack(grads).var(0).mean())
    # Variances of 1000 calls are within about 10 %.
    assert variances["flipout", 16] * 16 == pytest.approx(variances["flipout", 1], rel=0.3)
    assert variances["shared", 16] == pytest.approx(variances["shared", 1], rel=0.3)
