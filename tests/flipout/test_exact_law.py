"""Each example sees W + dW_m * (r_n s_n^T): outputs and gradients against explicit weights."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_revflip.flipout import (
    DropConnect,
    FlipoutEmbedding,
    FlipoutLinear,
    Gaussian,
    MultiplicativeGaussian,
    sampling,
)
from tests.helpers.flipout_layers import (
    Laplace,
    TwoScales,
    UniformNoise,
    explicit_output,
    explicit_weights,
    next_draw,
    perturbed_copy,
    reseed,
    torch_only,
)
from tests.helpers.properties import examples

DOUBLE, SINGLE = 1e-9, 2e-4
PERTURBATIONS = [
    Gaussian(0.3),
    Gaussian(0.3, learnable=False),
    MultiplicativeGaussian(0.4),
    DropConnect(),
    Laplace(),
    UniformNoise(),
    TwoScales(),
]
CONVOLUTIONS = {
    "1d": (partial(nn.Conv1d, 3, 4, 3), (5, 3, 9)),
    "2d": (partial(nn.Conv2d, 3, 4, 3, padding=1), (5, 3, 6, 7)),
    "3d": (partial(nn.Conv3d, 2, 3, 2), (4, 2, 4, 3, 5)),
    "no_bias": (partial(nn.Conv2d, 3, 4, 3, bias=False), (5, 3, 6, 7)),
    "stride": (partial(nn.Conv2d, 3, 4, 3, stride=(2, 1), padding=(1, 0)), (5, 3, 7, 6)),
    "dilation": (partial(nn.Conv2d, 3, 4, 3, dilation=(1, 2)), (5, 3, 7, 6)),
    "groups": (partial(nn.Conv2d, 4, 6, 3, groups=2), (5, 4, 6, 5)),
    "depthwise": (partial(nn.Conv1d, 4, 8, 3, groups=4), (5, 4, 6)),
    "same": (partial(nn.Conv2d, 3, 4, (1, 3), padding="same"), (5, 3, 6, 7)),
    "valid": (partial(nn.Conv1d, 3, 4, 3, padding="valid"), (5, 3, 9)),
    "circular": (
        partial(nn.Conv2d, 3, 4, 3, padding=(1, 2), padding_mode="circular"),
        (5, 3, 6, 7),
    ),
    "reflect": (partial(nn.Conv1d, 3, 4, 3, padding=2, padding_mode="reflect"), (5, 3, 9)),
    "replicate": (
        partial(nn.Conv3d, 2, 3, 3, padding=1, padding_mode="replicate"),
        (3, 2, 4, 3, 5),
    ),
    "same_circular": (
        partial(nn.Conv1d, 3, 4, 4, padding="same", padding_mode="circular"),
        (5, 3, 9),
    ),
}


def build(make, dtype, seed=0, **arguments):
    """A plain layer, and a perturbed one with the same weights that starts from a seed."""
    torch.manual_seed(seed)
    plain = make(dtype=dtype)
    layer = perturbed_copy(plain, **arguments)
    reseed(layer, seed)
    return plain, layer


def uniform(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(shape, generator=generator, dtype=dtype) - 0.3


def assert_exact(plain, layer, x, tolerance=DOUBLE, dim=0):
    """The output is that of explicit weights, and so are the gradients by all that has one."""
    differentiable = x.is_floating_point()
    if differentiable:
        x.requires_grad_()
    draw = next_draw(layer)
    batch = x.movedim(dim, 0)
    words = None if differentiable else batch
    weights = explicit_weights(layer, draw, len(batch), words)
    expected = explicit_output(plain, layer, weights, x, dim % x.dim())
    output = layer(x)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    leaves = [*layer.parameters(), *([x] if differentiable else [])]
    probe = uniform(*output.shape, dtype=output.dtype)
    found = torch.autograd.grad((output * probe).sum(), leaves)
    truth = torch.autograd.grad((expected * probe).sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("groups", [1, 3])
def test_linear_equals_explicit_weights(perturbation, groups):
    make = partial(nn.Linear, 4, 3)
    pair = build(make, torch.float64, perturbation=perturbation, base_perturbations=groups)
    assert_exact(*pair, uniform(7, 4))


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_float32_equals_explicit_weights_on_both_paths(perturbation, compiled):
    make = partial(nn.Linear, 70, 33)  # neither is a multiple of what a round of the noise gives
    with nullcontext() if compiled else torch_only():
        pair = build(make, torch.float32, perturbation=perturbation, base_perturbations=2)
        assert_exact(*pair, uniform(5, 70, dtype=torch.float32), SINGLE)


@pytest.mark.parametrize("groups", [1, 2, 7, 50])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_any_number_of_base_perturbations(groups, bias):
    pair = build(partial(nn.Linear, 4, 3, bias=bias), torch.float64, base_perturbations=groups)
    assert_exact(*pair, uniform(7, 4))


@pytest.mark.parametrize("dim", [0, 1, -2, -3])
def test_linear_example_dim_of_three_dimensional_inputs(dim):
    pair = build(partial(nn.Linear, 4, 3), torch.float64, example_dim=dim, base_perturbations=2)
    assert_exact(*pair, uniform(5, 6, 4), dim=dim)


def test_linear_four_dimensions():
    pair = build(partial(nn.Linear, 4, 3), torch.float64, example_dim=2)
    assert_exact(*pair, uniform(2, 3, 5, 4), dim=2)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_equals_explicit_weights(name, groups):
    make, shape = CONVOLUTIONS[name]
    assert_exact(*build(make, torch.float64, base_perturbations=groups), uniform(*shape))


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
def test_convolution_of_each_perturbation(perturbation):
    make, shape = CONVOLUTIONS["2d"]
    assert_exact(*build(make, torch.float64, perturbation=perturbation), uniform(*shape))
    pair = build(make, torch.float32, perturbation=perturbation)
    assert_exact(*pair, uniform(*shape, dtype=torch.float32), SINGLE)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("last", ["input", "weight", "both"])
def test_channels_last_draws_the_same_noise_in_both_passes(perturbation, last):
    make, _ = CONVOLUTIONS["2d"]
    plain, layer = build(make, torch.float32, perturbation=perturbation)
    x = uniform(5, 3, 6, 7, dtype=torch.float32)
    if last != "weight":
        x = x.to(memory_format=torch.channels_last)
    if last != "input":
        layer.to(memory_format=torch.channels_last)
    assert_exact(plain, layer, x, SINGLE)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
def test_transposed_weights_draw_the_same_noise_in_both_passes(perturbation):
    plain, layer = build(partial(nn.Linear, 4, 3), torch.float32, perturbation=perturbation)
    for name, parameter in list(layer.named_parameters()):
        if parameter.dim() == 2:
            strided = parameter.detach().t().contiguous().t()
            assert not strided.is_contiguous()
            setattr(layer, name, nn.Parameter(strided))
    assert_exact(plain, layer, uniform(6, 4, dtype=torch.float32), SINGLE)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_equals_explicit_weights(perturbation, padding_idx):
    make = partial(nn.Embedding, 6, 3, padding_idx=padding_idx)
    pair = build(make, torch.float64, perturbation=perturbation, base_perturbations=2)
    words = torch.tensor([[0, 2, 0, 5], [2, 2, 2, 2], [5, 1, 3, 0], [4, 4, 1, 2], [0, 0, 5, 3]])
    assert_exact(*pair, words)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_embedding_example_dim(dim):
    pair = build(partial(nn.Embedding, 6, 3), torch.float64, example_dim=dim)
    words = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(0))
    assert_exact(*pair, words, dim=dim)


def test_a_word_has_one_embedding_wherever_it_occurs_in_an_example():
    layer = FlipoutEmbedding(6, 3)
    output = layer(torch.tensor([[1, 4, 1], [1, 1, 1]]))
    assert torch.equal(output[0, 0], output[0, 2])
    assert torch.equal(output[1, 0], output[1, 1])
    assert not torch.equal(output[0, 0], output[1, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("make", "shape"),
    [(partial(nn.Linear, 4, 3), (6, 4)), CONVOLUTIONS["groups"], CONVOLUTIONS["same_circular"]],
    ids=["linear", "groups", "same_circular"],
)
@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
def test_shared_estimator_perturbs_all_examples_alike(make, shape, perturbation, dtype):
    pair = build(make, dtype, perturbation=perturbation, estimator="shared")
    tolerance = DOUBLE if dtype == torch.float64 else SINGLE
    assert_exact(*pair, uniform(*shape, dtype=dtype), tolerance)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_shared_embedding_is_one_table(padding_idx):
    make = partial(nn.Embedding, 6, 3, padding_idx=padding_idx)
    pair = build(make, torch.float64, estimator="shared")
    assert_exact(*pair, torch.tensor([[0, 2, 0, 5], [2, 1, 2, 2]]))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(nn.Linear, 4, 3), (4,)),
        (partial(nn.Conv1d, 4, 3, 2), (4, 5)),
        (partial(nn.Conv2d, 4, 3, 2), (4, 5, 6)),
        (partial(nn.Conv3d, 4, 3, 2), (4, 5, 6, 3)),
    ],
    ids=["linear", "conv1d", "conv2d", "conv3d"],
)
def test_an_input_without_batch_is_one_example(make, shape):
    _, layer = build(make, torch.float64)
    x = uniform(*shape)
    alone = layer(x)
    reseed(layer)
    torch.testing.assert_close(alone, layer(x.unsqueeze(0))[0], rtol=0, atol=0)


def test_a_single_word_is_one_example():
    _, layer = build(partial(nn.Embedding, 6, 3), torch.float64)
    alone = layer(torch.tensor(4))
    reseed(layer)
    assert torch.equal(alone, layer(torch.tensor([4]))[0])


@pytest.mark.parametrize("wanted", ["weight", "weight_rho", "bias", "input"])
def test_gradients_of_each_leaf_alone(wanted):
    _, layer = build(partial(nn.Conv1d, 3, 4, 3), torch.float64, base_perturbations=2)
    x = uniform(5, 3, 9).requires_grad_()
    leaves = {**dict(layer.named_parameters()), "input": x}
    layer(x).square().sum().backward()
    full = leaves[wanted].grad.clone()
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name == wanted)
    reseed(layer)
    layer(x).square().sum().backward()
    assert torch.equal(leaves[wanted].grad, full)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_backward_twice_with_retained_graph_gives_the_same():
    _, layer = build(partial(nn.Linear, 4, 3), torch.float32, base_perturbations=2)
    loss = layer(uniform(5, 4, dtype=torch.float32)).square().sum()
    leaves = list(layer.parameters())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@examples(max_examples=25)
@given(
    batch=st.integers(0, 5),
    rest=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 5)),
    groups=st.integers(1, 6),
    data=st.data(),
)
def test_linear_keeps_shapes_and_agrees_for_any_shape(batch, rest, sizes, groups, data):
    shape = [*rest]
    dim = data.draw(st.integers(0, len(rest)))
    shape.insert(dim, batch)
    pair = build(
        partial(nn.Linear, *sizes), torch.float64, example_dim=dim, base_perturbations=groups
    )
    x = uniform(*shape, sizes[0])
    assert pair[1](x).shape == (*shape, sizes[1])
    if batch:
        reseed(pair[1])
        assert_exact(*pair, x, dim=dim)


@examples(max_examples=25)
@given(
    batch=st.integers(0, 4),
    space=st.lists(st.integers(3, 6), min_size=1, max_size=3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.integers(1, 2),
    bases=st.integers(1, 3),
)
def test_convolutions_keep_shapes_and_agree_for_any_shape(
    batch, space, channels, kernel, stride, padding, groups, bases
):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space) - 1]
    inputs, outputs = (groups * channel for channel in channels)
    make = partial(kind, inputs, outputs, kernel, stride, padding, groups=groups)
    plain, layer = build(make, torch.float64, base_perturbations=bases)
    x = uniform(batch, inputs, *space)
    assert layer(x).shape == plain(x).shape
    if batch:
        reseed(layer)
        assert_exact(plain, layer, x)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (partial(nn.Linear, 4, 3), torch.empty(0, 4)),
        (partial(nn.Linear, 4, 3), torch.empty(0, 5, 4)),
        (partial(nn.Linear, 4, 3), torch.empty(2, 0, 4)),
        (partial(nn.Linear, 0, 3), torch.empty(2, 0)),
        (partial(nn.Conv2d, 4, 3, 3), torch.empty(0, 4, 5, 5)),
        (partial(nn.Embedding, 4, 3), torch.empty(0, 5, dtype=torch.int64)),
        (partial(nn.Embedding, 4, 3), torch.empty(5, 0, dtype=torch.int64)),
    ],
    ids=["linear", "linear3d", "no_steps", "no_inputs", "conv", "embedding", "no_words"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("estimator", ["flipout", "shared"])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(make, x, estimator):
    plain, layer = build(make, torch.float32, estimator=estimator)
    output = layer(x)
    assert output.shape == plain(x).shape
    output.sum().backward()
    assert float(layer.weight_rho.grad.abs().sum()) == 0


def test_local_reparameterization_is_the_normal_law_of_the_outputs():
    plain, layer = build(
        partial(nn.Linear, 4, 3),
        torch.float64,
        perturbation=Gaussian(0.3),
        estimator="local_reparameterization",
    )
    x = uniform(5, 4)
    noise = []
    for std in (0.3, 0.6):  # twice the spread is twice the noise around the mean
        layer.perturbation = Gaussian(std, learnable=False)
        reseed(layer)
        noise.append((layer(x) - plain(x)) / std)
    torch.testing.assert_close(noise[0], noise[1], rtol=DOUBLE, atol=DOUBLE)
    lengths = x.square().sum(1, keepdim=True).sqrt()
    assert float((noise[0] / lengths).detach().abs().max()) < 5  # standard normal numbers


def test_local_reparameterization_has_finite_gradients_where_an_example_is_zero():
    layer = FlipoutLinear(4, 3, estimator="local_reparameterization")
    x = torch.zeros(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in (x, *layer.parameters()))


def test_sampling_shared_equals_explicit_weights_whatever_the_estimator():
    for estimator in ("flipout", "shared", "local_reparameterization"):
        plain, layer = build(partial(nn.Linear, 4, 3), torch.float64, estimator=estimator)
        generator = torch.Generator().manual_seed(3)
        x = uniform(5, 4)
        with sampling(layer.eval(), "shared", generator):
            weights = explicit_weights(layer, layer.draws()["weight"], 5)
            output = layer(x)
        expected = explicit_output(plain, layer, weights, x, 0)
        torch.testing.assert_close(output, expected, rtol=DOUBLE, atol=DOUBLE)
