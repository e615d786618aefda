"""FlipoutLSTM and FlipoutGRU compute what explicit weights of each sequence give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lightning_revflip.flipout import (
    DropConnect,
    FlipoutGRU,
    Gaussian,
    MultiplicativeGaussian,
    NoiseSource,
    sampling,
)
from tests.helpers.flipout_recurrent import (
    CELLS,
    FEATURES,
    HIDDEN,
    PLAIN,
    UniformNoise,
    as_hx,
    as_parts,
    draws_of,
    explicit,
    make,
    normal,
    states,
    two_sample_distance,
)
from tests.helpers.properties import examples

EXACT = {"rtol": 1e-10, "atol": 1e-11}
ONLY_RECURRENT = ("weight_hh",)
OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "layers and directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "recurrent weights": {"perturbed": ONLY_RECURRENT, "num_layers": 2},
    "input weights": {"perturbed": ("weight_ih",)},
    "several base perturbations": {"base_perturbations": 3, "bidirectional": True},
    "DropConnect": {"perturbation": DropConnect(), "perturbed": ONLY_RECURRENT},
    "MultiplicativeGaussian": {"perturbation": MultiplicativeGaussian(0.5)},
    "own perturbation": {"perturbation": UniformNoise(), "base_perturbations": 2},
}


def call_padded(layer, x, hx):
    """Outputs of each sequence of x (batch, steps, features), and the last states."""
    output, last = layer(x if layer.batch_first else x.transpose(0, 1), hx)
    return output if layer.batch_first else output.transpose(0, 1), as_parts(last)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_output_is_that_of_explicit_weights(cell, options):
    layer = make(cell, **options)
    x, hx = normal(4, 5, FEATURES), states(layer, 4)
    expected, finals = explicit(layer, draws_of(layer), x, hx)
    output, last = call_padded(layer, x, as_hx(hx))
    torch.testing.assert_close(output, torch.stack(expected), **EXACT)
    torch.testing.assert_close(last, finals, **EXACT)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_an_input_without_batch_is_one_sequence(cell, batch_first):
    layer = make(cell, num_layers=2, batch_first=batch_first)
    x, hx = normal(5, FEATURES), states(layer, 1)
    (expected,), finals = explicit(layer, draws_of(layer), [x], hx)
    output, last = layer(x, as_hx([part.squeeze(1) for part in hx]))
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(as_parts(last), [part.squeeze(1) for part in finals], **EXACT)


@pytest.mark.parametrize("base_perturbations", [1, 3])
@pytest.mark.parametrize("lengths", [(5, 4, 4, 2, 1), (2, 5, 1, 4, 4), (3, 3, 3), (1, 6)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_packed_batch_gives_every_sequence_its_own_weights(cell, lengths, base_perturbations):
    options = {"num_layers": 2, "bidirectional": True, "base_perturbations": base_perturbations}
    layer = make(cell, **options)
    sequences = [normal(length, FEATURES, seed=number) for number, length in enumerate(lengths)]
    hx = states(layer, len(lengths))
    expected, finals = explicit(layer, draws_of(layer), sequences, hx)
    output, last = layer(pack_sequence(sequences, enforce_sorted=False), as_hx(hx))
    assert isinstance(output, PackedSequence)
    for own, other in zip(unpack_sequence(output), expected, strict=True):
        torch.testing.assert_close(own, other, **EXACT)
    torch.testing.assert_close(as_parts(last), finals, **EXACT)


@examples(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    base_perturbations=st.integers(1, 4),
    bidirectional=st.booleans(),
    cell=st.sampled_from(CELLS),
)
def test_any_lengths_and_groups_agree_with_explicit_weights(
    lengths, base_perturbations, bidirectional, cell
):
    layer = make(cell, base_perturbations=base_perturbations, bidirectional=bidirectional)
    sequences = [normal(length, FEATURES, seed=number) for number, length in enumerate(lengths)]
    zeros = [torch.zeros_like(part) for part in states(layer, len(lengths))]
    expected, finals = explicit(layer, draws_of(layer), sequences, zeros)
    output, last = layer(pack_sequence(sequences, enforce_sorted=False))
    torch.testing.assert_close(torch.cat(unpack_sequence(output)), torch.cat(expected), **EXACT)
    torch.testing.assert_close(as_parts(last), finals, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_float32_agrees_with_explicit_weights(cell):
    layer = make(cell, num_layers=2, bidirectional=True, dtype=torch.float32)
    x, hx = normal(4, 6, FEATURES, dtype=torch.float32), states(layer, 4)
    expected, finals = explicit(layer, draws_of(layer), x, hx)
    output, last = call_padded(layer, x, as_hx(hx))
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, finals, rtol=1e-5, atol=1e-5)


# --- what is drawn ----------------------------------------------------------------------------


def constant_response(layer, batch, steps):
    """Outputs (steps, batch, hidden) of a GRU that forgets at once, for a constant input."""
    with torch.no_grad():
        layer.bias_ih_l0[HIDDEN : 2 * HIDDEN] = -100.0  # z = 0, so h' = n
        return layer(normal(1, 1, FEATURES).expand(steps, batch, FEATURES))[0]


def test_noise_is_constant_over_the_steps_and_differs_between_sequences():
    layer = make(FlipoutGRU, perturbed=("weight_ih",))
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    output = constant_response(layer, batch=6, steps=10)
    assert (output == output[0]).all()
    assert len(output[0].unique(dim=0)) == 6


@pytest.mark.parametrize("cell", CELLS)
def test_input_and_recurrent_weights_layers_and_directions_have_signs_of_their_own(cell):
    layer = make(cell, num_layers=2, bidirectional=True)
    draws = draws_of(layer)
    assert len(draws) == 8
    signs = [draw.output_signs(5, 64, torch.empty(0)) for draw in draws.values()]
    assert len(torch.stack(signs).flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("cell", CELLS)
def test_each_call_draws_once_for_all_steps(cell):
    layer = make(cell)
    generator = layer.noise_source.generator
    states_before = []
    for steps in (1, 50):
        generator.manual_seed(3)
        layer(normal(steps, 2, FEATURES))
        states_before.append(generator.get_state())
    assert (states_before[0] == states_before[1]).all()


@pytest.mark.parametrize("cell", CELLS)
def test_the_law_of_an_output_is_that_of_independent_draws(cell):
    layer = make(cell, perturbation=Gaussian(init_std=0.5))
    x, calls = normal(3, 1, FEATURES), 1000
    with torch.no_grad():
        # One sequence of each call: those of different calls are independent.
        flipout = torch.stack([layer(x.expand(3, 2, -1))[0][-1, 1] for _ in range(calls)])
        plain = PLAIN[cell](FEATURES, HIDDEN, dtype=torch.float64)
        independent = []
        for _ in range(calls):
            for name, weight in plain.named_parameters():
                weight.copy_(getattr(layer, name))
            for name in layer.perturbed_names():
                std = F.softplus(layer.get_parameter(f"{name}_rho"))
                plain.get_parameter(name).add_(std * torch.randn_like(std))
            independent.append(plain(x)[0][-1, 0])
    for unit in range(HIDDEN):
        distance = two_sample_distance(flipout[:, unit], torch.stack(independent)[:, unit])
        assert distance < 2.7 * (2 / calls) ** 0.5  # exceeded by chance in one case of 10^6


# --- without signs ----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", ["eval", "mean"])
@pytest.mark.parametrize("cell", CELLS)
def test_mean_mode_is_the_plain_layer_bit_for_bit(cell, mode, packed):
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float32}
    layer = make(cell, **options)
    plain = PLAIN[cell](FEATURES, HIDDEN, **options)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = normal(6, 3, FEATURES, dtype=torch.float32)
    batch = pack_sequence([x[:, 0], x[:4, 1], x[:5, 2]], enforce_sorted=False) if packed else x
    if mode == "eval":
        output, last = layer.eval()(batch)
    else:
        with sampling(layer, "mean"):
            output, last = layer(batch)
    expected, finals = plain(batch)
    assert torch.equal(output.data, expected.data)
    assert all(map(torch.equal, as_parts(last), as_parts(finals)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("perturbed", [("weight_ih", "weight_hh"), ONLY_RECURRENT], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_shared_perturbs_all_sequences_alike(cell, perturbed, packed):
    layer = make(cell, num_layers=2, perturbed=perturbed, estimator="shared")
    x, hx = normal(3, 5, FEATURES), states(layer, 3)
    expected, finals = explicit(layer, draws_of(layer), x, hx)
    batch = pack_sequence(list(x)) if packed else x.transpose(0, 1)
    output, last = layer(batch, as_hx(hx))
    own = torch.stack(unpack_sequence(output)) if packed else output.transpose(0, 1)
    torch.testing.assert_close(own, torch.stack(expected), **EXACT)
    torch.testing.assert_close(as_parts(last), finals, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_a_shared_context_is_one_network_for_all_calls(cell):
    layer = make(cell).eval()
    x = normal(5, 3, FEATURES)
    with torch.no_grad(), sampling(layer, "shared"):
        assert torch.equal(layer(x)[0], layer(x)[0])
        torch.testing.assert_close(layer(x)[0][:, :1], layer(x[:, :1])[0], **EXACT)
        first = layer(x)[0]
    with torch.no_grad(), sampling(layer, "shared"):
        assert not torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("cell", CELLS)
def test_a_generator_makes_calls_repeatable(cell):
    layer, x = make(cell), normal(5, 3, FEATURES)
    outputs = []
    for seed in (1, 1, 2):
        layer.noise_source = NoiseSource(torch.Generator().manual_seed(seed))
        outputs.append(layer(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# --- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_lies_between_layers(cell):
    layer = make(cell, num_layers=2, dropout=1.0)  # so that the second layer sees zeros
    x, hx = normal(4, 5, FEATURES), states(layer, 4)
    silenced = make(cell, num_layers=2)
    with torch.no_grad():
        silenced.weight_ih_l1.zero_()
        silenced.weight_ih_l1_rho.fill_(-1e4)
    expected, finals = explicit(silenced, draws_of(layer), x, hx)
    output, last = call_padded(layer, x, as_hx(hx))
    torch.testing.assert_close(output, torch.stack(expected), **EXACT)
    torch.testing.assert_close(last, finals, **EXACT)
