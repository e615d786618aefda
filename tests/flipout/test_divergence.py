"""The divergence from the prior: exact, finite, once for each weight, and its gradient."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from lightning_revflip.convert import convert
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    DropConnect,
    FlipoutConv2d,
    FlipoutEmbedding,
    FlipoutLinear,
    Gaussian,
    MultiplicativeGaussian,
    add_kl_gradient,
    elbo_loss,
    kl,
)
from lightning_revflip.flipout.divergence import gaussian_kl, inverse_softplus, softplus
from tests.helpers.flipout_layers import NEEDS_COMPILER, Laplace, torch_only
from tests.helpers.properties import examples

PATHS = [
    pytest.param(torch.float32, True, id="compiled", marks=NEEDS_COMPILER),
    pytest.param(torch.float32, False, id="torch"),
    pytest.param(torch.float64, False, id="float64"),
]


class LearntOnly(Gaussian):
    """A divergence that depends on the spread alone."""

    def kl(self, mean, *spread):
        return spread[0].square().sum()

    add_kl_gradient = Laplace.add_kl_gradient


@pytest.fixture
def on(request):
    """The path of the test's parameter."""
    if request.getfixturevalue("compiled"):
        yield
    else:
        with torch_only():
            yield


def truth(mean, rho, prior_std):
    """By torch.distributions in float64."""
    posterior = Normal(mean.double(), F.softplus(rho.double(), threshold=700.0))
    prior = Normal(*torch.tensor([0.0, prior_std], dtype=torch.float64))
    return kl_divergence(posterior, prior).sum()


def randomised(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(("dtype", "compiled"), PATHS)
@pytest.mark.parametrize("prior_std", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 31, 4097])
def test_value_and_gradients_are_those_of_torch_distributions(dtype, compiled, prior_std, size):
    perturbation = Gaussian(prior_std=prior_std)
    layer = randomised(FlipoutLinear(size, 1, dtype=dtype, perturbation=perturbation))
    leaves = [layer.weight, layer.weight_rho]
    expected = truth(*leaves, prior_std)
    value = kl(layer)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected, leaves)
    found = torch.autograd.grad(3.0 * value, leaves)
    for grad, reference in zip(found, wanted, strict=True):
        scale = float(reference.abs().max())
        torch.testing.assert_close(grad, 3 * reference, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(("dtype", "compiled"), PATHS)
@pytest.mark.parametrize("rho", [-1000.0, -200.0, -88.0, -50.0, -17.0, 0.0, 17.0, 100.0, 1000.0])
def test_finite_and_right_at_extreme_rho(dtype, compiled, rho):
    layer = FlipoutLinear(40, 3, dtype=dtype, perturbation=Gaussian(prior_std=2.0))
    with torch.no_grad():
        layer.weight_rho.fill_(rho)
    value = kl(layer)
    value.backward()
    # softplus(rho) = exp(rho) far below 0; its logarithm is rho, sigmoid / softplus is 1.
    log_std = math.log(math.log1p(math.exp(rho))) if -700 < rho < 700 else min(rho, math.log(1000))
    std = math.exp(log_std) if log_std > -700 else 0.0
    sigmoid = 1 / (1 + math.exp(-rho)) if rho > -700 else 0.0
    squares = float(layer.weight.detach().double().square().sum())
    expected = 120 * (math.log(2.0) - log_std + std**2 / 8 - 0.5) + squares / 8
    slope = sigmoid * std / 4 - (sigmoid / std if std > 0 else 1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert value.item() == pytest.approx(expected, rel=tolerance)
    grad = layer.weight_rho.grad
    torch.testing.assert_close(grad, torch.full_like(grad, slope), rtol=tolerance, atol=0)
    assert bool(layer.weight.grad.isfinite().all())
    x = torch.ones(2, 40, dtype=dtype)
    output = layer(x)
    output.sum().backward()
    assert bool(output.isfinite().all())
    assert bool(layer.weight_rho.grad.isfinite().all())


@examples(max_examples=100)
@given(st.floats(1e-30, 1e6))
def test_inverse_softplus_inverts_softplus(std):
    rho = torch.tensor(inverse_softplus(std), dtype=torch.float64)
    assert float(softplus(rho)) == pytest.approx(std, rel=1e-9)


def test_initial_spread_is_init_std():
    layer = FlipoutLinear(3, 2, perturbation=Gaussian(init_std=0.02))
    assert torch.allclose(F.softplus(layer.weight_rho), torch.tensor(0.02))


def test_prior_std_is_a_standard_deviation():
    layer = FlipoutLinear(50, 40, perturbation=Gaussian(init_std=3.0, prior_std=3.0), bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    # The posterior is the prior; were 3 taken for a variance, it would be 1.4 for each weight.
    assert abs(kl(layer).item()) < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_second_derivatives_of_the_divergence(seed):
    layer = randomised(FlipoutLinear(3, 2, dtype=torch.float64), seed)
    rho = layer.weight_rho
    (first,) = torch.autograd.grad(kl(layer), rho, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), rho)
    leaf = rho.detach().requires_grad_()
    (first,) = torch.autograd.grad(truth(layer.weight, leaf, 1.0), leaf, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.sum(), leaf)[0])


# --- models -----------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        FlipoutEmbedding(11, 6),
        nn.Linear(6, 5),
        FlipoutLinear(5, 4, perturbation=Gaussian(prior_std=0.5)),
        FlipoutConv2d(2, 3, 3, perturbation=DropConnect()),
        FlipoutLinear(4, 2, perturbation=Gaussian(learnable=False)),
        FlipoutLinear(2, 2, perturbation=Gaussian(prior_std=None)),
    )


def test_kl_is_the_sum_over_the_weights_that_have_a_prior():
    net = model()
    expected = truth(net[0].weight, net[0].weight_rho, 1.0)
    expected = expected + truth(net[2].weight, net[2].weight_rho, 0.5)
    torch.testing.assert_close(kl(net).double(), expected, rtol=1e-6, atol=0)


def test_a_layer_used_twice_counts_once():
    layer = FlipoutLinear(4, 4)
    assert kl(nn.Sequential(layer, nn.ReLU(), layer)) == kl(layer)


def test_tied_weights_count_once():
    net = nn.ModuleDict({"in": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    net["out"].weight = net["in"].weight
    convert(net, FLIPOUT_LAYERS)
    torch.testing.assert_close(
        kl(net).double(), truth(net["in"].weight, net["in"].weight_rho, 1.0), rtol=1e-6, atol=0
    )


def test_kl_without_a_prior_is_refused():
    net = nn.Sequential(FlipoutLinear(2, 2, perturbation=DropConnect()))
    for call in (kl, lambda m: add_kl_gradient(m, 1.0), lambda m: elbo_loss(torch.ones(()), m, 5)):
        with pytest.raises(ValueError, match="no weight of Sequential has a prior.*DropConnect"):
            call(net)
        with pytest.raises(ValueError, match="Linear has no flipout layers"):
            call(nn.Linear(2, 2))


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(("dtype", "compiled"), PATHS)
@pytest.mark.parametrize("frozen", [(), ("0.weight",), ("2.weight_rho",), ("0.weight", "2.weight")])
def test_add_kl_gradient_is_autograd_of_kl_on_top_of_what_is_there(dtype, compiled, frozen):
    net = model().to(dtype)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    other = copy.deepcopy(net)
    for number, (name, parameter) in enumerate(other.named_parameters()):
        if number % 2 == 0 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.25)
            net.get_parameter(name).grad = parameter.grad.clone()
    (0.3 * kl(other)).backward()
    value = add_kl_gradient(net, 0.3)
    assert not value.requires_grad
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(value, kl(other).detach(), **tolerance)
    for (name, parameter), reference in zip(
        net.named_parameters(), other.parameters(), strict=True
    ):
        if reference.grad is None or name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, reference.grad, **tolerance)


def test_add_kl_gradient_of_a_divergence_that_leaves_the_mean_out():
    layer = FlipoutLinear(3, 2, perturbation=LearntOnly())
    add_kl_gradient(layer, 0.5)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight_rho.grad, layer.weight_rho.detach())


def test_add_kl_gradient_with_strided_parameters_and_gradients():
    net = FlipoutConv2d(4, 3, 3).to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    net.weight.grad = torch.zeros(net.weight.shape)
    kl(other).backward()
    add_kl_gradient(net, 1.0)
    torch.testing.assert_close(net.weight.grad, other.weight.grad)
    torch.testing.assert_close(net.weight_rho.grad, other.weight_rho.grad)


def test_elbo_loss_is_nll_plus_divergence_per_example():
    layer = FlipoutLinear(3, 2)
    nll = torch.tensor(1.5, requires_grad=True)
    expected = 1.5 + 0.25 * kl(layer) / 60
    torch.testing.assert_close(elbo_loss(nll, layer, 60, kl_weight=0.25), expected)


@pytest.mark.parametrize("number", [0, -3, 0.5, math.nan, math.inf, None, "60", True])
def test_num_data_has_to_be_the_number_of_examples(number):
    with pytest.raises(ValueError, match="num_data must be the number of examples"):
        elbo_loss(torch.ones(()), FlipoutLinear(3, 2), number)


def test_num_data_may_be_a_number_of_numpy():
    numpy = pytest.importorskip("numpy")
    layer = FlipoutLinear(3, 2)
    zero = torch.zeros(())
    torch.testing.assert_close(elbo_loss(zero, layer, numpy.int64(60)), elbo_loss(zero, layer, 60))


def test_noise_without_parameters_has_no_divergence():
    mean = torch.ones(3)
    for perturbation in (MultiplicativeGaussian(), DropConnect(), Gaussian(learnable=False)):
        assert perturbation.kl(mean) is None
        assert not perturbation.has_prior


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_is_formed_in_float32_at_least(dtype):
    mean, rho = torch.zeros(2**20, dtype=dtype), torch.full((2**20,), -4.0, dtype=dtype)
    expected = gaussian_kl(mean.double(), rho.double(), 1.0)
    found = gaussian_kl(mean.requires_grad_(), rho.requires_grad_(), 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    found.backward()
    assert rho.grad.dtype == dtype
