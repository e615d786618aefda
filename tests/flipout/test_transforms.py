"""Flipout layers under torch.func, torch.compile, autocast, checkpointing, copying and pickling."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from lightning_revflip.flipout import (
    DropConnect,
    FlipoutConv1d,
    FlipoutEmbedding,
    FlipoutLinear,
    Gaussian,
    MultiplicativeGaussian,
    sampling,
)
from tests.helpers.flipout_layers import NEEDS_COMPILER, Laplace, reseed, torch_only

LAYERS = {
    "linear": (lambda **kwargs: FlipoutLinear(4, 3, **kwargs), torch.randn(5, 4)),
    "conv": (lambda **kwargs: FlipoutConv1d(4, 3, 2, **kwargs), torch.randn(5, 4, 6)),
    "embedding": (lambda **kwargs: FlipoutEmbedding(6, 3, **kwargs), torch.randint(6, (5, 4))),
    "words": (lambda **kwargs: FlipoutEmbedding(6, 3, **kwargs), torch.randint(6, (5,))),
}
EACH = pytest.mark.parametrize("name", LAYERS)
PERTURBATIONS = pytest.mark.parametrize(
    "perturbation",
    [Gaussian(0.3), MultiplicativeGaussian(0.3), DropConnect(), Laplace()],
    ids=repr,
)
PATHS = pytest.mark.parametrize(
    "path", [pytest.param("compiled", marks=NEEDS_COMPILER), "torch"], indirect=True
)


@pytest.fixture
def path(request):
    """With and without the compiled functions."""
    if request.param == "compiled":
        yield
    else:
        with torch_only():
            yield


def build(name, **kwargs):
    torch.manual_seed(0)
    make, x = LAYERS[name]
    return make(**kwargs), x


def parameters(layer):
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


# --- torch.func -------------------------------------------------------------------------------


@EACH
@PERTURBATIONS
@pytest.mark.parametrize("estimator", ["flipout", "shared"])
def test_vmap_over_an_ensemble_draws_for_each_member(name, perturbation, estimator):
    layer, x = build(name, perturbation=perturbation, estimator=estimator)
    stacked, _ = stack_module_state([copy.deepcopy(layer) for _ in range(3)])
    outputs = vmap(lambda p: functional_call(layer, p, (x,)), randomness="different")(stacked)
    assert outputs.shape == (3, *layer(x).shape)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.usefixtures("path")
@PATHS
@EACH
@PERTURBATIONS
def test_a_shared_draw_is_the_same_inside_transforms_as_outside(name, perturbation):
    layer, x = build(name, perturbation=perturbation)
    layer.eval()
    state = parameters(layer)
    with sampling(layer, "shared"):
        expected = layer(x)
        expected_grad = torch.autograd.grad(expected.sum(), layer.weight)[0]
        ensemble = vmap(lambda p: functional_call(layer, p, (x,)))(
            {key: torch.stack([value, value]) for key, value in state.items()}
        )
        gradient = grad(lambda p: functional_call(layer, p, (x,)).sum())(state)["weight"]
        by_example = vmap(lambda row: layer(row.unsqueeze(0))[0])(x)
    torch.testing.assert_close(ensemble, torch.stack([expected, expected]))
    torch.testing.assert_close(gradient, expected_grad)
    torch.testing.assert_close(by_example, expected)


@EACH
def test_per_example_gradients(name):
    layer, x = build(name)
    state = parameters(layer)

    def loss(p, row):
        return functional_call(layer, p, (row.unsqueeze(0),)).square().sum()

    grads = vmap(grad(loss), in_dims=(None, 0), randomness="different")(state, x)
    assert {key: value.shape for key, value in grads.items()} == {
        key: (len(x), *value.shape) for key, value in state.items()
    }
    assert float(grads["weight_rho"].abs().sum()) > 0


@pytest.mark.parametrize("mode", ["flipout", "shared"])
@pytest.mark.parametrize("estimator", ["flipout", "local_reparameterization"])
def test_jvp_of_inputs_and_parameters(mode, estimator):
    layer, x = build("linear", estimator=estimator)
    state = parameters(layer)
    with sampling(layer, mode):
        output, slope = jvp(lambda p: functional_call(layer, p, (x,)), (state,), (state,))
        assert slope.shape == output.shape
        # The map is linear in the input, up to the bias.
        output, slope = jvp(layer, (x,), (x,))
    if estimator == "flipout" or mode == "shared":
        torch.testing.assert_close(slope + layer.bias, output)


def test_gradients_of_transformed_code_are_unbiased():
    layer, x = build("linear", perturbation=Gaussian(0.3), base_perturbations=2)
    state = parameters(layer)

    def loss(p):
        return 0.5 * functional_call(layer, p, (x,)).square().sum()

    seeds = torch.arange(2000)
    found = vmap(lambda _: grad(loss)(state)["weight_rho"], randomness="different")(seeds)
    rho = layer.weight_rho.detach()
    expected = 0.3 * rho.sigmoid() * x.square().sum(0)
    error = found.std(0) / 2000**0.5
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())


# --- torch.compile ----------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """`torch.compile` without a code generator, which is slow."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@EACH
@pytest.mark.parametrize("bases", [1, 2])
def test_compiled_layers_draw_anew_and_learn(name, bases, compiled):
    layer, x = build(name, base_perturbations=bases)
    call = compiled(layer)
    first = call(x)
    assert not torch.equal(first, call(x))
    first.square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(call(x).mean(), layer(x).mean(), rtol=0, atol=0.2)


@EACH
def test_compiled_layers_follow_eval_and_sampling(name, compiled):
    layer, x = build(name)
    call = compiled(layer)
    assert not torch.equal(call(x), call(x))
    layer.eval()
    mean = layer(x)
    torch.testing.assert_close(call(x), mean)
    with sampling(layer):
        assert not torch.equal(call(x), call(x))
    with sampling(layer.train(), "mean"):
        torch.testing.assert_close(call(x), mean)


@EACH
def test_a_shared_draw_breaks_the_graph_and_is_right(name):
    layer, x = build(name)
    torch._dynamo.reset()
    call = torch.compile(layer, backend="eager")
    with sampling(layer.eval(), "shared"):
        torch.testing.assert_close(call(x), layer(x))
        torch.testing.assert_close(call(x), layer(x))
    torch._dynamo.reset()


def test_a_layer_in_eval_can_be_exported():
    layer, x = build("linear")
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


# --- autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("estimator", ["flipout", "shared"])
@PERTURBATIONS
def test_autocast_computes_in_bfloat16_with_the_noise_and_gradients_of_float32(
    name, estimator, perturbation
):
    layer, x = build(name, estimator=estimator, perturbation=perturbation)
    x = x.clone().requires_grad_()
    results = []
    for enabled in (False, True):
        reseed(layer, 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(x)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        leaves = [x, *layer.parameters()]
        results.append([output.float(), *torch.autograd.grad(output.float().sum(), leaves)])
        assert all(part.dtype == torch.float32 for part in results[-1])
    for single, half in zip(*results, strict=True):
        # bfloat16 has 8 bits: 0.4 % of each of few terms.
        torch.testing.assert_close(half, single, rtol=0.03, atol=0.03 * single.abs().max().item())


def test_autocast_local_reparameterization():
    layer, x = build("linear", estimator="local_reparameterization")
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


def test_autocast_leaves_float64_alone_as_it_does_for_plain_layers():
    layer = FlipoutLinear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == nn.Linear(4, 3, dtype=torch.float64)(x).dtype == torch.float64


# --- checkpointing, copies --------------------------------------------------------------------


@EACH
def test_recomputed_activations_see_the_same_noise(name):
    layer, x = build(name)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(4)
        output = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        grads.append(torch.autograd.grad(output.square().sum(), layer.weight_rho)[0])
    assert torch.equal(*grads)


@EACH
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("seeded", [True, False], ids=["generator", "global"])
def test_copies_compute_the_same(name, way, seeded):
    layer, x = build(name, perturbation=Laplace())
    if seeded:
        reseed(layer)
        layer(x)
    other = _copy(layer, way)
    assert repr(other) == repr(layer)
    outputs = []
    for each in (layer, other):
        torch.manual_seed(2)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    assert not torch.equal(other(x), outputs[1])


def _copy(layer, way):
    if way == "deepcopy":
        return copy.deepcopy(layer)
    if way == "pickle":
        return pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
