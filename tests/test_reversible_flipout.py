"""RevGRU and RevLSTM with perturbed recurrent weights."""

import pytest
import torch
from torch import Tensor, nn

from lightning_revflip.convert import apply_spec, convert, recorded_spec
from lightning_revflip.flipout import DropConnect, Gaussian, MultiplicativeGaussian, kl, sampling
from lightning_revflip.flipout.draw import Draw
from lightning_revflip.reversible import LinearCrossEntropy, ReversibleSequence, RevGRU, RevLSTM
from lightning_revflip.reversible_flipout import (
    REVERSIBLE_FLIPOUT_LAYERS,
    FlipoutRevGRU,
    FlipoutRevLSTM,
)
from tests.helpers.reference_cell import ReferenceRNN

LAYERS = {"gru": (FlipoutRevGRU, RevGRU), "lstm": (FlipoutRevLSTM, RevLSTM)}
PERTURBATIONS = [Gaussian(0.1), MultiplicativeGaussian(0.3), DropConnect()]


def fixed(layer: nn.Module) -> dict[str, Draw]:
    """Let every call of a layer draw the same numbers, and return them."""
    draws = {name: Draw(seed) for seed, name in enumerate(layer.perturbed_names())}
    layer.draws = lambda: draws
    return draws


def explicit_weights(layer: nn.Module, draws: dict[str, Draw], batch: int) -> dict[str, Tensor]:
    """All parameters, with W + dW * (r_n s_n^T) of each sequence as recurrent weights."""
    found = dict(layer.named_parameters())
    for name, draw in draws.items():
        mean = found[name]
        noise = layer.perturbation.unit_noise(mean, draw.weight_seed(0))
        delta = layer.perturbation.scale(mean, *layer.spread(name)) * noise
        s = draw.input_signs(batch, layer.hidden_size, mean).unflatten(1, (2, 1, -1))
        r = draw.output_signs(batch, len(mean), mean).unflatten(1, (2, -1, 1))
        found[name] = mean + delta * (s * r).flatten(1, 2)
    return found


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: type(p).__name__)
def test_outputs_and_gradients_are_those_of_explicit_weights(kind, perturbation) -> None:
    """After two calls before one backward pass; the truth is autograd through the plain cell."""
    torch.manual_seed(1)
    layer = LAYERS[kind][0](
        5, 8, 2, bidirectional=True, perturbation=perturbation, dtype=torch.float64
    )
    draws = fixed(layer)
    xs = torch.randn(2, 9, 3, 5, dtype=torch.float64)
    reference = ReferenceRNN.of(layer)
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    for x in xs:
        output, (truth, _) = layer(x)[0], reference(explicit_weights(layer, draws, 3), x)
        assert torch.equal(output, truth)
        losses = [a + b.square().sum() for a, b in zip(losses, (output, truth), strict=True)]
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found, expected = (torch.autograd.grad(loss, parameters) for loss in losses)
    for name, grad, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_is_that_of_the_reversible_layer_bit_for_bit(kind) -> None:
    perturbed, plain = LAYERS[kind]
    layer, alone = perturbed(5, 8).eval(), plain(5, 8)
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if "rho" not in k})
    x = torch.randn(9, 3, 5)
    assert torch.equal(layer(x)[0], alone(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_an_upgrade_keeps_weights_and_is_repeated_on_a_fresh_model(kind) -> None:
    plain = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
    model, fresh = nn.Sequential(plain(5, 8)), nn.Sequential(plain(5, 8))
    convert(model, {plain: LAYERS[kind][1]})
    before = model[0].weight_hh_l0
    convert(model, REVERSIBLE_FLIPOUT_LAYERS, perturbation=Gaussian(0.03), perturbed=["weight_hh"])
    assert model[0].weight_hh_l0 is before
    assert type(model[0]) is LAYERS[kind][0]
    apply_spec(fresh, recorded_spec(model))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(9, 3, 5)
    assert torch.equal(model.eval()[0](x)[0], fresh.eval()[0](x)[0])


def test_a_sequence_draws_once_and_reverses_exactly() -> None:
    torch.manual_seed(0)
    rnn = FlipoutRevLSTM(6, 8, perturbation=DropConnect())
    sequence = ReversibleSequence(
        nn.Embedding(11, 6), rnn, LinearCrossEntropy(8, 11), chunk_steps=4
    )
    tokens = torch.randint(11, (31, 3))
    drawn = []
    rnn.draws = lambda draws=rnn.draws: drawn.append(1) or draws()
    loss, _ = sequence(tokens[:-1], None, tokens[1:])
    loss.backward()
    assert len(drawn) == 1
    assert rnn.weight_hh_l0.grad.abs().sum() > 0


def test_kl_counts_recurrent_weights_once() -> None:
    rnn = FlipoutRevLSTM(5, 8, 2, perturbation=Gaussian(0.1, prior_std=0.5))
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, nn.functional.softplus(rho)),
            torch.distributions.Normal(0.0, 0.5),
        ).sum()
        for mean, rho in [
            (rnn.weight_hh_l0, rnn.weight_hh_l0_rho),
            (rnn.weight_hh_l1, rnn.weight_hh_l1_rho),
        ]
    )
    torch.testing.assert_close(kl(rnn), expected, rtol=1e-5, atol=0)


def test_one_draw_of_a_context_holds_for_all_calls() -> None:
    rnn, x = FlipoutRevGRU(5, 8).eval(), torch.randn(9, 1, 5).expand(9, 3, 5)
    with sampling(rnn, "shared"):
        first, second = rnn(x)[0], rnn(x)[0]
    assert torch.equal(first, second)
    assert torch.equal(first[:, 0], first[:, 2])
    with sampling(rnn):
        assert not torch.equal(rnn(x)[0][:, 0], rnn(x)[0][:, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_perturbations": 2}, "one base perturbation per batch, got base_perturbations=2"),
        ({"perturbed": ["weight_ih"]}, "perturbs recurrent weights alone"),
        ({"estimator": "local_reparameterization"}, "no local reparameterization"),
        ({"strength": 2}, "no argument strength"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_is_refused_and_changes_nothing(arguments, message) -> None:
    model = nn.Sequential(RevLSTM(5, 8))
    with pytest.raises(ValueError, match=message):
        convert(model, REVERSIBLE_FLIPOUT_LAYERS, **arguments)
    assert type(model[0]) is RevLSTM


def test_the_constructor_takes_what_a_conversion_takes() -> None:
    FlipoutRevLSTM(5, 8, perturbed=["weight_hh"], base_perturbations=1)
    with pytest.raises(ValueError, match="one base perturbation per batch"):
        FlipoutRevLSTM(5, 8, base_perturbations=2)
