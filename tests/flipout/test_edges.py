"""Unusual inputs and uses: they work as with plain layers, or fail with a clear error."""

import pytest
import torch
from torch import nn

from lightning_revflip.flipout import (
    FlipoutConv2d,
    FlipoutEmbedding,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    kl,
)
from tests.helpers.flipout_layers import reseed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ["flipout", "shared", "local_reparameterization"])
def test_every_floating_dtype_trains(dtype, estimator):
    layer = FlipoutLinear(4, 3, dtype=dtype, estimator=estimator)
    output = layer(torch.ones(5, 4, dtype=dtype))
    output.square().sum().backward()
    assert output.dtype == dtype
    assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())
    assert bool(kl(layer).isfinite())


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4).double(), torch.ones(2, 4).long()], ids=["f64", "int"]
)
def test_inputs_of_another_dtype_fail_as_in_the_plain_layer(x):
    layer = FlipoutLinear(4, 3)
    for module in (layer, nn.Linear(4, 3)):
        with pytest.raises(RuntimeError, match="dtype"):
            module(x)


@pytest.mark.parametrize("shape", [(2, 5), (5,)], ids=str)
def test_a_wrong_number_of_features_fails_as_in_the_plain_layer(shape):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size mismatch"):
        FlipoutLinear(4, 3)(torch.ones(shape))


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5, 6, 7), (4,)], ids=str)
def test_a_wrong_number_of_dimensions_is_named(shape):
    with pytest.raises(ValueError, match=r"takes \(examples, channels, space, space\) or"):
        FlipoutConv2d(4, 3, 2)(torch.ones(shape))


@pytest.mark.parametrize("dim", [-1, 2, 5, -4], ids=str)
def test_linear_refuses_an_example_dim_that_is_none(dim):
    layer = FlipoutLinear(4, 3, example_dim=dim)
    with pytest.raises(ValueError, match=rf"example_dim={dim} is no dimension of examples"):
        layer(torch.ones(2, 5, 4))


@pytest.mark.parametrize("dim", [2, -3], ids=str)
def test_embedding_refuses_an_example_dim_that_is_none(dim):
    layer = FlipoutEmbedding(4, 3, example_dim=dim)
    with pytest.raises(ValueError, match=rf"example_dim={dim} is no dimension of an input"):
        layer(torch.ones(2, 5, dtype=torch.int64))


def test_a_number_is_no_input_of_a_linear_layer():
    with pytest.raises(ValueError, match="is no dimension of examples in an input of shape"):
        FlipoutLinear(1, 1)(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(FlipoutLinear(4, 3), (5, 4)), (FlipoutConv2d(2, 3, 2), (5, 2, 3, 3))],
    ids=["linear", "conv"],
)
def test_strided_and_expanded_inputs_and_gradients(layer, shape):
    x = torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))
    for strided in (x, torch.randn(1, *shape[1:]).expand(shape)):
        results = []
        for each in (strided, strided.contiguous()):
            reseed(layer)
            output = layer(each)
            layer.zero_grad()
            output.sum().backward()  # an expanded gradient
            results.append([output, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["weight", "weight_rho"])
def test_weights_changed_between_the_passes_are_noticed(name):
    layer = FlipoutLinear(4, 3)
    loss = layer(torch.ones(2, 4)).sum()
    with torch.no_grad():
        layer.get_parameter(name).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_changed_between_the_passes_is_noticed():
    x = torch.ones(2, 4)
    loss = FlipoutLinear(4, 3)(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_may_be_changed_in_place():
    layer = FlipoutLinear(4, 3)
    layer(torch.ones(2, 4)).relu_().sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("estimator", ["flipout", "shared"])
@pytest.mark.parametrize(
    ("kind", "arguments", "shape"),
    [
        (FlipoutLinear, (4, 3), (2, 4)),
        (FlipoutConv2d, (2, 3, 2), (2, 2, 3, 3)),
        (FlipoutLSTM, (4, 3), (5, 2, 4)),
    ],
    ids=["linear", "conv", "lstm"],
)
def test_second_derivatives_are_refused(kind, arguments, shape, estimator):
    """Also where the incoming gradient, here that of a sum, does not require one itself."""
    layer, x = kind(*arguments, estimator=estimator), torch.ones(shape, requires_grad=True)
    found = layer(x)
    output = found[0] if isinstance(found, tuple) else found
    with pytest.raises(RuntimeError, match="double backward through a flipout layer"):
        torch.autograd.grad(output.sum(), [x, *layer.parameters()], create_graph=True)


def test_training_layers_can_be_traced():
    layer, x = FlipoutLinear(4, 3), torch.ones(2, 4)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert traced(x).shape == (2, 3)
    assert not torch.equal(traced(x), traced(x))


def test_second_derivatives_work_where_torch_transforms_the_code():
    layer = FlipoutLinear(4, 3)
    gradient = torch.func.jacrev(lambda x: layer(x).square().sum())
    hessian = torch.func.jacfwd(gradient, randomness="same")(torch.ones(4))
    assert hessian.shape == (4, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_gradients(mode):
    layer = FlipoutEmbedding(4, 3)
    with mode():
        assert not layer(torch.tensor([[1, 2]])).requires_grad
    layer(torch.tensor([[1, 2]])).sum().backward()  # nothing that inference mode left is in the way


def test_noise_made_in_inference_mode_does_not_stay_in_the_way():
    layer = FlipoutLinear(4, 3, dtype=torch.float64)
    with torch.inference_mode():
        layer(torch.ones(2, 4, dtype=torch.float64))
    layer(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    assert layer.weight_rho.grad is not None


def test_nan_in_rho_reaches_the_output():
    layer = FlipoutLinear(4, 3)
    with torch.no_grad():
        layer.weight_rho[0, 0] = torch.nan
    output = layer(torch.ones(2, 4))
    assert bool(output[:, 0].isnan().all())
    assert bool(output[:, 1:].isfinite().all())
    assert bool(kl(layer).isnan())


def test_reset_parameters_resets_the_spread_as_well():
    layer = FlipoutConv2d(2, 3, 2, perturbation=Gaussian(0.3))
    initial = layer.weight_rho.detach().clone()
    with torch.no_grad():
        layer.weight_rho.zero_()
        layer.weight.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.weight_rho, initial)
    assert float(layer.weight.detach().abs().sum()) > 0


def test_words_outside_the_table_fail_as_in_the_plain_layer():
    with pytest.raises(IndexError):
        FlipoutEmbedding(4, 3)(torch.tensor([[4]]))


def test_int32_words_are_those_of_int64():
    layer = FlipoutEmbedding(40, 3)
    words = torch.randint(40, (5, 6))
    outputs = []
    for dtype in (torch.int32, torch.int64):
        reseed(layer)
        outputs.append(layer(words.to(dtype)))
    assert torch.equal(*outputs)
