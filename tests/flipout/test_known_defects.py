"""What other flipout libraries get wrong, one section for each defect, and what is right here.

Measured in bayesian-torch and its relatives: noise kept in a buffer (1), convolution signs for each
pixel (2), recurrent weights drawn anew at each step (3), a divergence of the wrong size (4), signs
that are none (5), conversion that breaks models (6), and layers without mean mode, generator, or
torch.func (7).
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from lightning_revflip.convert import convert
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutEmbedding,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    NoiseSource,
    kl,
    sampling,
)
from tests.helpers.flipout_layers import next_draw, reseed

LAYERS = {
    "linear": lambda **kwargs: (FlipoutLinear(4, 3, **kwargs), torch.randn(5, 4)),
    "conv": lambda **kwargs: (FlipoutConv1d(2, 3, 2, **kwargs), torch.randn(5, 2, 4)),
    "embedding": lambda **kwargs: (
        FlipoutEmbedding(6, 3, **kwargs),
        torch.tensor([[1, 2, 1], [0, 5, 1]]),
    ),
}


def build(name, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    layer, x = LAYERS[name](dtype=dtype, **kwargs)
    return layer, x.to(dtype) if x.is_floating_point() else x


# --- 1. noise is not kept in a buffer ---------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("linear", "local_reparameterization"),
        *((name, estimator) for name in LAYERS for estimator in ("flipout", "shared")),
    ],
)
def test_1_rho_gradients_after_several_calls_equal_finite_differences(name, calls, estimator):
    layer, x = build(name, torch.float64, estimator=estimator)

    def loss():
        reseed(layer, 3)
        return sum(layer(x).square().sum() * (call + 1) for call in range(calls))

    loss().backward()
    rho, step = layer.weight_rho, 1e-5
    found = rho.grad.clone()
    expected = torch.zeros_like(rho)
    with torch.no_grad():
        for index in range(rho.numel()):
            values = []
            for sign in (1, -1):
                rho.view(-1)[index] += sign * step
                values.append(loss())
                rho.view(-1)[index] -= sign * step
            expected.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    assert float((found - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("name", LAYERS)
def test_1_calls_draw_anew_and_a_later_call_does_not_change_an_earlier_gradient(name):
    layer, x = build(name)
    reseed(layer)
    first = layer(x)
    alone = torch.autograd.grad(first.sum(), layer.weight_rho)[0]
    reseed(layer)
    first = layer(x)
    second = layer(x)
    assert not torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(first.sum(), layer.weight_rho)[0], alone)


@pytest.mark.parametrize("name", LAYERS)
def test_1_no_buffers_and_two_numbers_for_each_weight(name):
    layer, x = build(name)
    layer(x)
    assert not list(layer.buffers())
    assert {n for n, _ in layer.named_parameters()} == {"weight", "weight_rho", "bias"} - (
        {"bias"} if name == "embedding" else set()
    )
    assert layer.weight_rho.shape == layer.weight.shape


# --- 2. convolution signs are constant over space ---------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
def test_2_the_mean_over_space_varies_as_with_one_weight_for_an_example(kernel):
    torch.manual_seed(0)
    layer = FlipoutConv2d(3, 2, kernel, bias=False, perturbation=Gaussian(0.2), dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    calls = 1500
    with torch.no_grad():
        found = torch.stack([layer(x).mean((2, 3)) for _ in range(calls)]).var(0)
    # The mean over space is linear in the weight: its variance is std^2 times squared coefficients.
    weight = layer.weight.detach().requires_grad_()
    for example in range(2):
        for channel in range(2):
            mean = F.conv2d(x[example : example + 1], weight)[0, channel].mean()
            coefficients = torch.autograd.grad(mean, weight)[0]
            expected = 0.2**2 * coefficients.square().sum()
            # Standard error of a variance: sqrt(2 / calls) = 3.7 %.
            assert float(found[example, channel] / expected) == pytest.approx(1, abs=0.18)


# --- 3. recurrent layers draw once for a sequence ---------------------------------------------


def test_3_weights_and_signs_hold_for_a_sequence():
    torch.manual_seed(0)
    layer = FlipoutLSTM(3, 4, perturbation=Gaussian(0.2))
    output = layer(torch.ones(100, 2, 3))[0]
    # With an input that does not change, a fixed network comes to rest; one that is drawn anew at
    # each step does not. Sequences have networks of their own.
    torch.testing.assert_close(output[-1], output[-2], rtol=0, atol=1e-6)
    assert (output[-1, 0] - output[-1, 1]).abs().max().item() > 1e-3


def test_3_divergence_does_not_grow_with_the_length_or_the_calls():
    layer = FlipoutLSTM(3, 4)
    before = kl(layer)
    layer(torch.randn(50, 2, 3))
    layer(torch.randn(50, 2, 3))
    assert torch.equal(kl(layer), before)


# --- 4. the divergence is the exact sum -------------------------------------------------------


def test_4_kl_is_the_sum_over_all_weights_by_torch_distributions():
    torch.manual_seed(0)
    net = nn.Sequential(FlipoutConv2d(2, 3, 3), FlipoutLinear(4, 5), FlipoutEmbedding(6, 7))
    terms = [
        kl_divergence(Normal(layer.weight, F.softplus(layer.weight_rho)), Normal(0.0, 1.0)).sum()
        for layer in net
    ]
    torch.testing.assert_close(kl(net), torch.stack(terms).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [-1000.0, 1000.0])
def test_4_extreme_rho_gives_finite_values_and_gradients(rho, dtype):
    layer = FlipoutLinear(3, 2, dtype=dtype)
    with torch.no_grad():
        layer.weight_rho.fill_(rho)
    value = kl(layer)
    value.backward()
    assert math.isfinite(value.item())
    assert bool(layer.weight_rho.grad.isfinite().all())


# --- 5. signs are signs -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_5_output_signs_are_exactly_plus_and_minus_one(dtype):
    layer, _ = build("linear", dtype)
    reseed(layer)
    draw = next_draw(layer)
    for drawn in (draw.input_signs(200, 3, layer.weight), draw.output_signs(200, 3, layer.weight)):
        assert set(drawn.flatten().tolist()) == {-1.0, 1.0}


# --- 6. conversion ----------------------------------------------------------------------------


def test_6_a_linear_layer_at_the_top_is_converted():
    model = nn.Linear(3, 2)
    convert(model, FLIPOUT_LAYERS)
    assert type(model) is FlipoutLinear


@pytest.mark.filterwarnings("ignore:.*out_proj")
def test_6_a_transformer_encoder_layer_is_converted_and_runs():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    convert(model, FLIPOUT_LAYERS)
    x = torch.randn(3, 5, 8)
    model(x).sum().backward()
    assert model.linear1.weight_rho.grad is not None
    assert model.eval()(x).shape == x.shape


def test_6_both_directions_and_layers_of_an_lstm_stay():
    model = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    before = model(torch.ones(5, 2, 3))[0]
    convert(model, FLIPOUT_LAYERS)
    assert (type(model), model.num_layers, model.bidirectional) == (FlipoutLSTM, 2, True)
    assert torch.equal(model.eval()(torch.ones(5, 2, 3))[0], before)


def test_6_an_lstm_cell_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTMCell(3, 4))
    with pytest.raises(ValueError, match="'1' is a LSTMCell"):
        convert(model, FLIPOUT_LAYERS)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
def test_6_padding_mode_and_dtype_are_kept(mode):
    plain = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    before = plain(x)
    convert(plain, FLIPOUT_LAYERS)
    assert torch.equal(plain.eval()(x), before)
    assert plain.weight_rho.dtype == torch.float64
    with torch.no_grad():
        plain.weight_rho.fill_(-100.0)  # hardly any noise: the perturbed path pads likewise
    torch.testing.assert_close(plain.train()(x), before)


def test_6_tied_weights_stay_tied():
    model = nn.ModuleDict({"in": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    model["out"].weight = model["in"].weight
    convert(model, FLIPOUT_LAYERS)
    assert model["out"].weight is model["in"].weight
    assert model["out"].weight_rho is model["in"].weight_rho
    torch.testing.assert_close(kl(model), kl(model["in"]), rtol=0, atol=0)


def test_6_plain_checkpoints_load_strictly():
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5), nn.Embedding(6, 7))
    converted = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5), nn.Embedding(6, 7))
    convert(converted, FLIPOUT_LAYERS)
    built = nn.Sequential(FlipoutConv2d(2, 3, 3), FlipoutLinear(4, 5), FlipoutEmbedding(6, 7))
    for model in (converted, built):
        model.load_state_dict(plain.state_dict(), strict=True)
        for ours, theirs in zip(model, plain, strict=True):
            assert torch.equal(ours.weight, theirs.weight)


# --- 7. modes, generators, torch.func ---------------------------------------------------------


PLAIN = {"linear": nn.Linear, "conv": nn.Conv1d, "embedding": nn.Embedding}


@pytest.mark.parametrize("name", LAYERS)
def test_7_eval_computes_with_the_mean_bit_for_bit_and_draws_nothing(name):
    layer, x = build(name)
    expected = PLAIN[name].forward(layer, x)
    before = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), expected)
    with sampling(layer.train(), "mean"):
        assert torch.equal(layer(x), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", LAYERS)
def test_7_noise_follows_from_the_generator(name):
    layer, x = build(name)

    def output(seed):
        layer.noise_source = NoiseSource(torch.Generator().manual_seed(seed))
        return layer(x)

    before = torch.get_rng_state()
    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))  # as ranks with different generators
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", LAYERS)
def test_7_the_global_generator_gives_one_seed_for_a_call_and_is_not_reset(name):
    layer, x = build(name)
    torch.manual_seed(5)
    torch.randint(2**62, ())
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    layer(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_7_vmap_over_inputs_and_over_parameters(name):
    layer, x = build(name)
    vmap = torch.func.vmap
    assert vmap(layer, randomness="different")(x).shape == layer(x).shape
    stacked = {n: torch.stack([p, p]) for n, p in layer.named_parameters()}
    call = torch.func.functional_call
    outputs = vmap(lambda p: call(layer, p, (x,)), randomness="different")(stacked)
    assert outputs.shape == (2, *layer(x).shape)
    assert not torch.equal(outputs[0], outputs[1])
