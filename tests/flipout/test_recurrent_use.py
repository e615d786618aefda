"""FlipoutLSTM and FlipoutGRU in the places of nn.LSTM and nn.GRU."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.convert import convert
from lightning_revflip.flipout import FLIPOUT_LAYERS, DropConnect, FlipoutGRU, FlipoutLSTM, sampling
from lightning_revflip.flipout.noise import LIBRARY
from tests.helpers.flipout_recurrent import (
    CELLS,
    FEATURES,
    HIDDEN,
    PLAIN,
    as_hx,
    as_parts,
    draws_of,
    explicit,
    make,
    normal,
    objective,
    states,
)


def single(*shape):
    return normal(*shape, dtype=torch.float32)


def shapes_and_types(output, last):
    return [(part.shape, part.dtype) for part in [output.data, *as_parts(last)]]


# --- in place of the plain layer --------------------------------------------------------------


@pytest.mark.parametrize("layout", ["3-D", "2-D", "packed", "empty batch"])
@pytest.mark.parametrize("cell", CELLS)
def test_results_have_the_shapes_and_types_of_the_plain_layer(cell, layout):
    for num_layers, batch_first, bidirectional in product((1, 2), (False, True), (False, True)):
        options = {
            "num_layers": num_layers,
            "batch_first": batch_first,
            "bidirectional": bidirectional,
        }
        layer, plain = cell(FEATURES, HIDDEN, **options), PLAIN[cell](FEATURES, HIDDEN, **options)
        batch = 0 if layout == "empty batch" else 3
        x = single(5, FEATURES) if layout == "2-D" else single(5, batch, FEATURES)
        x = x.transpose(0, 1) if batch_first and layout != "2-D" else x
        if layout == "packed":
            x = pack_padded_sequence(x, torch.tensor([1, 5, 4]), batch_first, enforce_sorted=False)
        assert shapes_and_types(*layer(x)) == shapes_and_types(*plain(x))


@pytest.mark.parametrize("cell", CELLS)
def test_a_checkpoint_of_the_plain_layer_loads(cell):
    plain, layer = PLAIN[cell](FEATURES, HIDDEN, 2), cell(FEATURES, HIDDEN, 2)
    spread = layer.weight_hh_l1_rho.detach().clone()
    layer.load_state_dict(plain.state_dict())
    x = single(5, 3, FEATURES)
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])
    assert torch.equal(layer.weight_hh_l1_rho, spread)


@pytest.mark.parametrize("plain", [nn.LSTM, nn.GRU])
def test_conversion_keeps_all_layers_and_directions(plain):
    rnn = plain(FEATURES, HIDDEN, 2, bidirectional=True, batch_first=True, dropout=0.5)
    model = nn.ModuleDict({"rnn": rnn})
    x = single(3, 5, FEATURES)
    expected, parameters = rnn.eval()(x)[0], dict(rnn.named_parameters())
    convert(model, FLIPOUT_LAYERS, perturbed=("weight_hh",), perturbation=DropConnect())
    assert model["rnn"] is rnn
    assert type(rnn) is FLIPOUT_LAYERS[plain]
    assert torch.equal(rnn(x)[0], expected)
    assert all(rnn.get_parameter(name) is value for name, value in parameters.items())
    assert len(rnn.perturbed_names()) == 4
    assert not torch.equal(rnn.train()(x)[0], expected)


def test_the_model_itself_can_be_converted_and_trained():
    rnn = nn.LSTM(FEATURES, HIDDEN)
    convert(rnn, FLIPOUT_LAYERS)
    assert {name for name, _ in rnn.named_parameters() if name.endswith("rho")} == {
        "weight_ih_l0_rho",
        "weight_hh_l0_rho",
    }
    rnn(single(5, 3, FEATURES))[0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in rnn.parameters())


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNN])
def test_conversion_refuses_relatives_by_name(kind):
    model = nn.Sequential(nn.Linear(2, 2), kind(2, 2))
    with pytest.raises(ValueError, match=f"'1' is a {kind.__name__}"):
        convert(model, FLIPOUT_LAYERS)
    assert type(model[0]) is nn.Linear


def test_conversion_refuses_a_projection():
    model = nn.Sequential(nn.LSTM(4, 5, proj_size=2))
    with pytest.raises(ValueError, match="cannot convert '0': .*no projection, got proj_size=2"):
        convert(model, FLIPOUT_LAYERS)
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("change", ["copy", "pickle", "dtype", "load_state_dict", "assign"])
@pytest.mark.parametrize("cell", CELLS)
def test_replaced_parameters_are_those_that_compute(cell, change):
    layer = PLAIN[cell](FEATURES, HIDDEN)
    convert(layer, FLIPOUT_LAYERS)
    other = make(cell, seed=3, dtype=torch.float32).state_dict()
    if change == "copy":
        layer = copy.deepcopy(layer)
    elif change == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif change == "dtype":
        layer.to(torch.float64)
    layer.load_state_dict(other, assign=change == "assign")
    reference = make(cell, seed=3, dtype=layer.weight_ih_l0.dtype)
    layer.noise_source = reference.noise_source
    x, hx = normal(4, 5, FEATURES).to(layer.weight_ih_l0), states(layer, 4)
    if change == "dtype":
        reference.load_state_dict(other)
    expected, _ = explicit(reference, draws_of(reference), x, hx)
    output, _ = layer(x.transpose(0, 1), as_hx(hx))
    torch.testing.assert_close(output.transpose(0, 1), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_a_parametrized_weight_is_the_mean(cell):
    layer = make(cell)
    weight_norm(layer, "weight_hh_l0")
    x, hx = normal(4, 5, FEATURES), states(layer, 4)
    tensors = [parameter for _, parameter in layer.named_parameters()]
    expected = objective(*explicit(layer, draws_of(layer), x, hx))
    output, last = layer(x.transpose(0, 1), as_hx(hx))
    found = objective(list(output.transpose(0, 1)), as_parts(last))
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_reset_parameters_gives_the_spread_its_initial_value(cell):
    layer = cell(FEATURES, HIDDEN)
    initial = layer.weight_hh_l0_rho.detach().clone()
    before = layer.weight_hh_l0.detach().clone()
    with torch.no_grad():
        layer.weight_hh_l0_rho.add_(1.0)
    layer.reset_parameters()
    assert torch.equal(layer.weight_hh_l0_rho, initial)
    assert not torch.equal(layer.weight_hh_l0, before)


def test_the_representation_names_what_is_not_usual():
    layer = FlipoutLSTM(4, 3, num_layers=2, perturbation=DropConnect(), perturbed=("weight_hh",))
    assert repr(layer) == (
        "FlipoutLSTM(4, 3, num_layers=2, perturbation=DropConnect(p=0.5), perturbed=('weight_hh',))"
    )


# --- transformed by torch ---------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["flipout", "shared"])
@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_grad_gives_every_element_its_own_noise(cell, estimator):
    layer = make(cell, num_layers=2, bidirectional=True, estimator=estimator)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = normal(5, 3, FEATURES)

    def loss(parameters, offset):
        return functional_call(layer, parameters, (x + offset,))[0].sin().sum()

    each = vmap(grad(loss), (None, 0), randomness="different")
    found = each(parameters, torch.zeros(4, dtype=torch.float64))
    for name, value in found.items():
        assert value.shape == (4, *parameters[name].shape)
        assert len(value.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize("base_perturbations", [1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_without_noise_transformed_code_agrees_with_the_plain_layer(
    cell, packed, base_perturbations
):
    layer = make(cell, num_layers=2, bidirectional=True, base_perturbations=base_perturbations)
    for name in layer.perturbed_names():
        layer.get_parameter(f"{name}_rho").data.fill_(-1e4)
    plain = PLAIN[cell](FEATURES, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = normal(5, 3, FEATURES)
    batch = pack_padded_sequence(x, torch.tensor([5, 3, 1])) if packed else x
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, module):
        output, last = functional_call(module, parameters, (batch,))
        return objective([output.data], as_parts(last))

    expected = torch.autograd.grad(
        loss(dict(plain.named_parameters()), plain), list(plain.parameters())
    )
    found = grad(loss)(parameters, layer)
    for (name, _), value in zip(plain.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("cell", CELLS)
def test_a_shared_context_holds_in_transformed_code(cell):
    layer, x = make(cell), normal(5, 3, FEATURES)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    with sampling(layer, "shared", torch.Generator().manual_seed(1)):
        expected = layer(x)[0]
        found = vmap(lambda part: functional_call(layer, parameters, (part.unsqueeze(1),))[0], 1)(x)
    torch.testing.assert_close(found.squeeze(2).transpose(0, 1), expected)


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_is_near_float32(cell, parameters, monkeypatch):
    # The signs of a seed are the same in both dtypes where torch draws them all.
    monkeypatch.setitem(vars(LIBRARY), "_loaded", None)
    layer = make(cell, dtype=torch.float32, perturbation=DropConnect()).to(parameters)
    x, hx = single(4, 6, FEATURES).bfloat16(), [h.bfloat16() for h in states(layer, 4)]
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        draws = draws_of(layer)
        output, last = layer(x.transpose(0, 1), as_hx(hx))
    output.float().sum().backward()
    assert {part.dtype for part in [output, *as_parts(last)]} == {torch.bfloat16}
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())
    expected, _ = explicit(layer.float(), draws, x.float(), [h.float() for h in hx])
    # Outputs are below 1, and bfloat16 has 8 bits.
    error = (output.transpose(0, 1) - torch.stack(expected)).abs().max()
    assert error < 0.02


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbed": "weight_hh"}, "got 'weight_hh'. Use perturbed=\\(\"weight_hh\",\\)"),
        ({"perturbed": ()}, "perturbed must name some of the weights"),
        ({"perturbed": ("bias_hh",)}, "perturbed must name some of .* got \\('bias_hh',\\)"),
        ({"estimator": "local_reparameterization"}, "has no local reparameterization"),
        ({"base_perturbations": 0}, "base_perturbations must be a whole number from 1"),
    ],
    ids=["string", "nothing", "bias", "local", "groups"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_settings_that_do_not_fit_are_refused(cell, options, message):
    with pytest.raises(ValueError, match=message):
        cell(FEATURES, HIDDEN, **options)


def test_a_projection_is_refused():
    with pytest.raises(ValueError, match="no projection, got proj_size=2. Use proj_size=0"):
        FlipoutLSTM(FEATURES, HIDDEN, proj_size=2)


@pytest.mark.parametrize("cell", CELLS)
def test_wrong_inputs_are_refused(cell):
    layer, x = cell(FEATURES, HIDDEN), single(5, 3, FEATURES)
    with pytest.raises(RuntimeError, match="Expected 4, got 5"):
        layer(single(5, 3, 5))
    with pytest.raises(ValueError, match="2 or 3 dimensions, .* got shape \\(4,\\)"):
        layer(single(FEATURES))
    with pytest.raises(ValueError, match="at least one step, got shape \\(0, 3, 4\\)"):
        layer(x[:0])
    with pytest.raises(ValueError, match="weight dtype|must have the type"):
        layer(x.double())
    wrong = [single(1, 2, HIDDEN)] * layer.cell.states
    with pytest.raises(RuntimeError, match="Expected hidden"):
        layer(x, as_hx(wrong))
    double = [normal(1, 3, HIDDEN)] * layer.cell.states
    with pytest.raises(ValueError, match="initial states must have the dtype of the input"):
        layer(x, as_hx(double))


def test_a_wrong_number_of_states_is_refused():
    x, state = single(5, 3, FEATURES), single(1, 3, HIDDEN)
    with pytest.raises(ValueError, match="FlipoutLSTM takes \\(h_0, c_0\\) .* got one tensor"):
        FlipoutLSTM(FEATURES, HIDDEN)(x, state)
    with pytest.raises(ValueError, match="FlipoutGRU takes one tensor h_0 .* got a tuple"):
        FlipoutGRU(FEATURES, HIDDEN)(x, (state, state))
