"""Perturbations: their laws and gradients, a user's own, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_revflip._conversion_values import plain, rebuilt
from lightning_revflip.flipout import (
    DropConnect,
    FlipoutConv2d,
    FlipoutEmbedding,
    FlipoutLinear,
    Gaussian,
    MultiplicativeGaussian,
    Perturbation,
    sampling,
)
from tests.helpers.flipout_layers import Laplace, TwoScales, UniformNoise, torch_only

BUILT_IN = [
    Gaussian(0.3),
    Gaussian(0.3, prior_std=None),
    Gaussian(0.3, learnable=False),
    MultiplicativeGaussian(0.4),
    DropConnect(),
]
OWN = [Laplace(), UniformNoise(), TwoScales()]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ALL = pytest.mark.parametrize("perturbation", [*BUILT_IN, *OWN], ids=repr)


class Shifted(UniformNoise):
    """Noise of variance 1 and mean 0 that is not symmetric."""

    def noise(self, like, generator):
        return torch.empty_like(like).exponential_(generator=generator) - 1


class Biased(UniformNoise):
    def noise(self, like, generator):
        return super().noise(like, generator) + 0.2


class Wide(UniformNoise):
    """Uniform between -1 and 1: variance 1/3."""

    def noise(self, like, generator):
        return 2 * torch.rand(like.shape, generator=generator, dtype=like.dtype) - 1


class Forgetful(UniformNoise):
    """Draws from torch's global generator, and would find other noise in the backward pass."""

    def noise(self, like, generator):
        return torch.randn_like(like)


class Misshapen(UniformNoise):
    def noise(self, like, generator):
        return torch.randn(len(like), generator=generator)  # not in the dtype asked for


class Broken(UniformNoise):
    def noise(self, like, generator):
        return torch.full_like(like, math.nan)


class WithList(UniformNoise):
    """Settings that cannot be hashed."""

    def __init__(self, stds=(0.1,)):
        super().__init__(stds[0])
        self.stds = list(stds)


def weight_and_spread(perturbation, dtype, shape=(37, 5)):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator, dtype=dtype)
    spread = [
        part + 0.1 * torch.rand(shape, generator=generator, dtype=dtype)
        for part in perturbation.initial_spread(mean)
    ]
    return mean, spread


# --- laws -------------------------------------------------------------------------------------


@ALL
@DTYPES
def test_dw_is_scale_times_unit_noise(perturbation, dtype):
    mean, spread = weight_and_spread(perturbation, dtype)
    found = perturbation.sample(mean, spread, 7)
    expected = perturbation.scale(mean, *spread) * perturbation.unit_noise(mean, 7)
    torch.testing.assert_close(found, expected)
    assert (found.dtype, found.shape) == (dtype, mean.shape)
    assert torch.equal(found, perturbation.sample(mean, spread, 7))
    assert not torch.equal(found, perturbation.sample(mean, spread, 8))


@ALL
@DTYPES
def test_vjp_draws_the_same_dw_and_has_the_gradients_of_the_formula(perturbation, dtype):
    mean, spread = weight_and_spread(perturbation, dtype)
    leaves = [part.clone().requires_grad_() for part in (mean, *spread)]
    expected = perturbation.scale(*leaves) * perturbation.unit_noise(mean, 7)
    grad = torch.rand(mean.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found, grad_mean, grad_spread = perturbation.vjp(mean, spread, 7, grad.clone())
    torch.testing.assert_close(found, perturbation.sample(mean, spread, 7))
    truth = [torch.zeros_like(mean)] * len(leaves)
    if expected.requires_grad:
        truth = torch.autograd.grad(expected, leaves, grad, materialize_grads=True)
    grad_mean = torch.zeros_like(mean) if grad_mean is None else grad_mean
    torch.testing.assert_close([grad_mean, *grad_spread], list(truth))


@ALL
def test_gradients_may_be_overwritten(perturbation):
    mean, spread = weight_and_spread(perturbation, torch.float32)
    _, grad_mean, grad_spread = perturbation.vjp(mean, spread, 7, torch.ones_like(mean))
    own = [part for part in (grad_mean, *grad_spread) if part is not None]
    assert len({part.data_ptr() for part in own}) == len(own)


@ALL
def test_noise_has_mean_zero_and_variance_one(perturbation):
    noise = perturbation.noise(torch.empty(100_000), torch.Generator().manual_seed(0)).double()
    error = math.sqrt(float((noise**4).mean()) / len(noise))
    assert abs(float(noise.mean())) < 5 / math.sqrt(len(noise))
    assert abs(float(noise.square().mean()) - 1) < 5 * error + 1e-12


def test_drop_connect_drops_or_doubles():
    mean = torch.full((1000,), 3.0)
    for weight in (mean + DropConnect().sample(mean, [], 1), _on_torch(mean)):
        assert set(weight.tolist()) == {0.0, 6.0}


def _on_torch(mean):
    with torch_only():
        return mean + DropConnect().sample(mean, [], 1)


@pytest.mark.parametrize("std", [1e-6, 0.05, 1.0, 50.0])
def test_gaussian_starts_at_its_standard_deviation(std):
    mean = torch.empty(4, 3, dtype=torch.float64)
    (rho,) = Gaussian(std).initial_spread(mean)
    scale = Gaussian(std).scale(mean, rho)
    torch.testing.assert_close(scale, torch.full_like(scale, std), rtol=1e-9, atol=0)


# --- a user's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", OWN, ids=repr)
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda **kwargs: FlipoutLinear(3, 2, **kwargs), torch.ones(4, 3)),
        (lambda **kwargs: FlipoutConv2d(3, 2, 2, **kwargs), torch.ones(4, 3, 3, 3)),
        (lambda **kwargs: FlipoutEmbedding(5, 2, **kwargs), torch.tensor([[1, 2], [2, 2]])),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_ones_own_perturbation_learns_its_parameters(make, x, perturbation):
    layer = make(perturbation=perturbation)
    names = {f"weight_{name}" for name in perturbation.spread_names}
    assert names == {name for name, _ in layer.named_parameters()} - {"weight", "bias"}
    layer(x).square().sum().backward()
    for parameter in layer.parameters():
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("perturbation", "message"),
    [
        (Shifted(), "Shifted.noise is not symmetric around 0"),
        (Biased(), "Biased.noise is not symmetric around 0"),
        (Wide(), "Wide.noise must have variance 1.*it has 0.33.*Divide the noise by 0.57"),
        (Forgetful(), "Forgetful.noise must draw from `generator`"),
        (Misshapen(), "Misshapen.noise must return the shape and dtype of `like`"),
        (Broken(), "Broken.noise must draw from `generator`.*NaN"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Perturbation) else "",
)
def test_noise_that_flipout_cannot_use_is_refused(perturbation, message):
    with pytest.raises(ValueError, match=message):
        FlipoutLinear(3, 2, perturbation=perturbation)
    linear = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        FlipoutLinear.upgrade(linear, perturbation=perturbation)
    assert type(linear) is nn.Linear


def test_asymmetric_noise_works_where_all_examples_share_it_and_nowhere_else():
    layer = FlipoutLinear(3, 2, perturbation=Shifted(), estimator="shared")
    output = layer(torch.ones(4, 3))
    assert torch.equal(output[0], output[3])
    with sampling(layer, "shared"):
        layer(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"not symmetric.*mode='shared'"), sampling(layer):
        pass


def test_noise_that_is_not_repeatable_is_refused_for_every_estimator():
    with pytest.raises(ValueError, match="must draw from `generator`"):
        FlipoutLinear(3, 2, perturbation=Forgetful(), estimator="shared")


def test_checks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="not symmetric"):
        FlipoutLinear.check_upgrade(nn.Linear(3, 2, device="meta"), perturbation=Shifted(0.7))
    assert torch.equal(torch.get_rng_state(), before)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda std: Gaussian(init_std=std), "init_std"),
        (lambda std: Gaussian(prior_std=std), "prior_std"),
        (MultiplicativeGaussian, "std"),
    ],
    ids=["init_std", "prior_std", "std"],
)
def test_standard_deviations_have_to_be_positive_and_finite(make, name, std):
    with pytest.raises(ValueError, match=f"^{name} must be a positive standard deviation, got"):
        make(std)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0, -1, math.nan])
def test_drop_connect_is_symmetric_at_one_half_alone(p):
    with pytest.raises(ValueError, match=r"p=0.5 alone, got p=.*MultiplicativeGaussian"):
        DropConnect(p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perturbation": "gaussian"}, "needs a Perturbation such as Gaussian.*str"),
        ({"perturbation": Gaussian}, "needs a Perturbation such as Gaussian"),
        ({"estimator": "Flipout"}, "estimator must be one of .*'Flipout'"),
        ({"base_perturbations": 0}, "base_perturbations must be a whole number from 1, got 0"),
        ({"base_perturbations": -2}, "base_perturbations must be a whole number from 1, got -2"),
        ({"estimator": "shared", "base_perturbations": 2}, "needs estimator='flipout'"),
        (
            {"estimator": "local_reparameterization", "base_perturbations": 2},
            "needs estimator='flipout'",
        ),
        (
            {"estimator": "local_reparameterization", "perturbation": DropConnect()},
            "the noise of DropConnect is not normal",
        ),
        (
            {"estimator": "local_reparameterization", "perturbation": Laplace()},
            "the noise of Laplace is not normal",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlipoutLinear(3, 2, **arguments)
    linear = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        FlipoutLinear.upgrade(linear, **arguments)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: FlipoutConv2d(3, 2, 2, **kwargs),
        lambda **kwargs: FlipoutEmbedding(3, 2, **kwargs),
    ],
    ids=["conv", "embedding"],
)
def test_local_reparameterization_is_refused_where_outputs_are_not_independent(make):
    with pytest.raises(ValueError, match=r"has no local reparameterization.*estimator='flipout'"):
        make(estimator="local_reparameterization")


def test_local_reparameterization_is_refused_for_rows_that_share_weights():
    layer = FlipoutLinear(3, 2, estimator="local_reparameterization")
    with pytest.raises(ValueError, match=r"takes inputs \(examples, features\), got shape"):
        layer(torch.ones(4, 5, 3))


@ALL
def test_configuration_round_trip_equality_and_hash(perturbation):
    config = perturbation.to_config()
    assert set(config) == {"class_path", "init_args"}
    again = rebuilt(plain(perturbation, "perturbation"))
    assert again == perturbation
    assert hash(again) == hash(perturbation)
    assert repr(again) == repr(perturbation)
    assert copy.deepcopy(perturbation) == perturbation


def test_equality_needs_class_and_settings():
    assert Gaussian(0.1) != Gaussian(0.2)
    assert Gaussian(0.1) != Gaussian(0.1, learnable=False)
    assert Gaussian() != MultiplicativeGaussian()
    assert Shifted(0.2) != UniformNoise(0.2)
    assert DropConnect() != "DropConnect(p=0.5)"
    assert len({Gaussian(), Gaussian(0.05), DropConnect()}) == 2


def test_settings_may_be_lists():
    assert hash(WithList([0.1])) == hash(WithList([0.1]))
    assert FlipoutLinear(3, 2, perturbation=WithList([0.1])).perturbation == WithList([0.1])


def test_repr_has_the_arguments():
    assert repr(Gaussian(0.1, None)) == "Gaussian(init_std=0.1, prior_std=None, learnable=True)"
    layer = FlipoutLinear(3, 2, perturbation=DropConnect(), base_perturbations=4, example_dim=1)
    text = "in_features=3, out_features=2, bias=True, perturbation=DropConnect(p=0.5)"
    assert repr(layer) == f"FlipoutLinear({text}, base_perturbations=4, example_dim=1)"


class Unnamed(Gaussian):
    """Does not keep its argument."""

    def __init__(self, size: float) -> None:
        super().__init__(init_std=size)


class Scalar(Gaussian):
    """Has one spread for all of a weight."""

    def initial_spread(self, mean):
        return [mean.new_zeros(())]


class Missing(Gaussian):
    """Has no spread though it names one."""

    def initial_spread(self, mean):
        return []


def test_a_perturbation_must_keep_the_arguments_of_its_constructor():
    with pytest.raises(ValueError, match="must keep the arguments.*there is no size"):
        Unnamed(0.1).to_config()


@pytest.mark.parametrize("kind", [Scalar, Missing])
def test_a_spread_must_have_the_shape_of_its_weight(kind):
    with pytest.raises(ValueError, match="must return a tensor in the shape of the weight"):
        FlipoutLinear(4, 3, perturbation=kind())
