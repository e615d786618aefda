"""`sampling` and `sample_n`: how layers draw in a context, and that it ends with the context."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_revflip.convert import convert
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    FlipoutConv1d,
    FlipoutEmbedding,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    sample_n,
    sampling,
)


def network(**kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(FlipoutLinear(4, 5, **kwargs), nn.Tanh(), FlipoutLinear(5, 3, **kwargs))
    return net.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.linspace(-1, 1, 24).view(6, 4)
SAME = torch.ones(6, 4)


def alike(output):
    """Whether all rows are the same."""
    return bool((output == output[0]).all())


def test_flipout_draws_for_each_call_and_example_also_in_eval():
    net = network()
    with sampling(net):
        first, second = net(SAME), net(SAME)
    assert not alike(first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("estimator", ["flipout", "local_reparameterization", "shared"])
def test_shared_is_one_network_for_all_examples_and_calls(estimator):
    net = network(estimator=estimator)
    with sampling(net, "shared"):
        first, second = net(SAME), net(X)
        assert alike(first)
        assert torch.equal(second, net(X))
        torch.testing.assert_close(net(X[2:4]), second[2:4])
    with sampling(net, "shared"):
        assert not torch.equal(net(X), second)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (FlipoutConv1d(2, 3, 2), torch.ones(4, 2, 5)),
        (FlipoutEmbedding(5, 3), torch.tensor([[1, 2], [1, 2]])),
        (FlipoutLSTM(2, 3, batch_first=True), torch.ones(4, 6, 2)),
    ],
    ids=["conv", "embedding", "lstm"],
)
def test_shared_holds_for_every_kind_of_layer(layer, x):
    def call():
        output = layer(x)
        return output[0] if isinstance(output, tuple) else output

    layer.eval()
    plain = call()
    with sampling(layer, "shared"):
        first = call()
        torch.testing.assert_close(first[1], first[0])
        assert torch.equal(call(), first)
    assert not torch.equal(first, plain)


def test_mean_computes_with_the_mean_also_in_training():
    net = network()
    expected = net(X)
    with sampling(net.train(), "mean"):
        assert torch.equal(net(X), expected)
    assert not torch.equal(net(X), expected)


@pytest.mark.parametrize("mode", ["flipout", "shared"])
def test_a_generator_repeats_what_is_drawn_and_leaves_the_global_one_alone(mode):
    net = network()
    before = torch.get_rng_state()
    outputs = []
    for seed in (1, 1, 2):
        with sampling(net, mode, seeded(seed)):
            outputs.append((net(X), net(X)))
    assert torch.equal(torch.get_rng_state(), before)
    for first, again in zip(outputs[0], outputs[1], strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(outputs[0][0], outputs[2][0])


def test_a_generator_goes_on_from_context_to_context():
    net, generator = network(), seeded()
    outputs = []
    for _ in range(2):
        with sampling(net, "shared", generator):
            outputs.append(net(X))
    assert not torch.equal(*outputs)


def test_contexts_nest_and_the_inner_one_counts():
    net = network()
    mean = net(X)
    with sampling(net, "shared"):
        outer = net(X)
        with sampling(net, "mean"):
            assert torch.equal(net(X), mean)
            with sampling(net[0], "flipout"):
                assert not torch.equal(net(X), mean)
            assert torch.equal(net(X), mean)
        assert torch.equal(net(X), outer)
    assert torch.equal(net(X), mean)


def test_a_context_ends_when_an_error_leaves_it():
    net = network()
    mean = net(X)
    with pytest.raises(RuntimeError, match="on purpose"), sampling(net):
        raise RuntimeError("on purpose")
    assert torch.equal(net(X), mean)
    assert torch.backends.mha.get_fastpath_enabled()


def test_gradients_flow_within_a_context():
    net = network()
    with sampling(net, "shared"):
        net(X).square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:.*out_proj")
@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layers", [0, 2], ids=["layer", "stack"])
def test_encoder_layers_sample_where_their_fast_path_would_compute_with_the_mean(layers):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    if layers:
        model = nn.TransformerEncoder(model, layers)
    convert(model, FLIPOUT_LAYERS, perturbation=Gaussian(0.3))
    model.eval()
    x = torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    with torch.inference_mode():
        mean = model(x, src_key_padding_mask=padding)
        for mode in ("flipout", "shared"):
            with sampling(model, mode):
                assert not torch.backends.mha.get_fastpath_enabled()
                noise = (model(x, src_key_padding_mask=padding) - mean).abs().max()
            assert float(noise) > 1e-2
        assert torch.backends.mha.get_fastpath_enabled()
        with sampling(model, "mean"):
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), mean)


def test_a_fast_path_that_the_user_turned_off_stays_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sampling(network()):
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (FlipoutLinear(2, 2), {"mode": "Shared"}, r"mode must be one of .*'Shared'"),
        (nn.Linear(2, 2), {}, r"Linear has no flipout layers.*FLIPOUT_LAYERS"),
    ],
    ids=["mode", "model"],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message), sampling(model, **arguments):
        pass


# --- sample_n ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: dict


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = FlipoutLinear(4, 3)

    def forward(self, x, scale=1.0):
        y = self.layer(x) * scale
        return Pair(y, {"sum": y.sum(), "parts": [y[:2], None]})


@pytest.mark.parametrize("mode", ["flipout", "shared"])
def test_outputs_of_n_draws_are_stacked_also_in_nested_outputs(mode):
    model = Nested().eval()
    output = sample_n(model, X, scale=2.0, n=5, mode=mode, generator=seeded())
    assert isinstance(output, Pair)
    assert output.first.shape == (5, 6, 3)
    assert output.second["sum"].shape == (5,)
    assert output.second["parts"][0].shape == (5, 2, 3)
    assert output.second["parts"][1] is None
    with sampling(model, mode, seeded()):
        assert torch.equal(model(X, 2.0).first, output.first[0])
    assert not torch.equal(output.first[0], output.first[1])


def test_mean_and_spread_of_samples_are_those_of_the_weights():
    torch.manual_seed(0)
    layer = FlipoutLinear(4, 3, perturbation=Gaussian(0.2)).eval()
    with torch.no_grad():
        samples = sample_n(layer, X, n=2000, generator=seeded())
        mean = layer(X)
    std = 0.2 * X.square().sum(1, keepdim=True).sqrt()
    error = 5 * std / 2000**0.5
    assert bool(((samples.mean(0) - mean).abs() < error).all())
    assert bool(((samples.std(0) - std).abs() < error).all())


def test_joint_predictions_of_shared_samples_are_correlated_and_marginal_ones_are_not():
    layer = network()[0]
    noise = {
        mode: sample_n(layer, SAME[:2], n=500, mode=mode).detach() - layer(SAME[:2]).detach()
        for mode in ("shared", "flipout")
    }
    correlation = {
        mode: float((z[:, 0] * z[:, 1]).mean() / z.square().mean()) for mode, z in noise.items()
    }
    assert correlation["shared"] == pytest.approx(1)
    assert abs(correlation["flipout"]) < 0.15  # 5 standard errors are at most 0.1 and a little


def test_sample_n_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        sample_n(network(), X, n=0)

    class Number(nn.Sequential):
        def forward(self, x):
            return super().forward(x), 3

    with pytest.raises(ValueError, match=r"stacks tensors, and the model returns int"):
        sample_n(Number(FlipoutLinear(4, 2)), X, n=2)


def test_a_private_generator_is_refused_where_activations_are_recomputed():
    layer, x = FlipoutLinear(4, 3), torch.randn(5, 4, requires_grad=True)
    with sampling(layer, generator=torch.Generator()):
        output = checkpoint(layer, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="is called in the backward pass"):
            output.sum().backward()


def test_the_global_generator_recomputes_the_same_noise():
    layer, x = FlipoutLinear(4, 3), torch.randn(5, 4)
    torch.manual_seed(0)
    layer(x).square().sum().backward()
    expected = layer.weight_rho.grad.clone()
    layer.zero_grad()
    torch.manual_seed(0)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.weight_rho.grad, expected)
