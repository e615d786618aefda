"""RevGRU and RevLSTM take the place of nn.GRU and nn.LSTM."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report
from tests.helpers.passes import (
    CELLS,
    assert_close,
    call,
    gradients,
    initial_states,
    make,
    normal,
    weighted_sum,
)
from tests.helpers.reference_cell import ReferenceRNN

ORDINARY = {RevGRU: nn.GRU, RevLSTM: nn.LSTM}
LAYOUTS = ["3-D", "2-D", "packed", "packed unsorted"]


def in_layout(layout, batch_first):
    """Five steps of three sequences, as the user may pass them."""
    x = normal(5, 4) if layout == "2-D" else normal(5, 3, 4)
    if batch_first and layout != "2-D":
        x = x.transpose(0, 1)
    if not layout.startswith("packed"):
        return x
    lengths = torch.tensor([5, 4, 1] if layout == "packed" else [1, 5, 4])
    return pack_padded_sequence(x, lengths, batch_first, enforce_sorted=layout == "packed")


def shapes_and_types(output, finals):
    if isinstance(output, PackedSequence):
        output = [output.data, output.batch_sizes, output.sorted_indices, output.unsorted_indices]
    else:
        output = [output]
    tensors = [tensor for tensor in [*output, *finals] if tensor is not None]
    return type(output), [(tensor.shape, tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_results_have_the_shapes_and_types_of_the_ordinary_layer(cell, layout, given):
    for num_layers, batch_first, bidirectional, bias in product(
        (1, 3), (False, True), (False, True), (False, True)
    ):
        options = {
            "num_layers": num_layers,
            "batch_first": batch_first,
            "bidirectional": bidirectional,
            "bias": bias,
        }
        rnn, ordinary = make(cell, 4, 6, **options), ORDINARY[cell](4, 6, **options)
        x = in_layout(layout, batch_first)
        states = initial_states(rnn, 3) if given else []
        if layout == "2-D":
            states = [state[:, 0] for state in states]
        result, truth = call(rnn, x, states), call(ordinary, x, states)
        assert type(result[0]) is type(truth[0])
        assert shapes_and_types(*result) == shapes_and_types(*truth)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_the_input_arrives_in_every_layout(cell, layout, batch_first):
    rnn = make(cell, 4, 6, batch_first=batch_first, dtype=torch.float64)
    standard = make(cell, 4, 6, dtype=torch.float64)
    x = normal(5, 1, 4, dtype=torch.float64).requires_grad_()
    truth = gradients(weighted_sum([call(standard, x)[0].flatten()]), {"x": x})
    if layout == "2-D":
        inputs = x.squeeze(1)
    else:
        inputs = x.transpose(0, 1) if batch_first else x
    if layout.startswith("packed"):
        lengths = torch.tensor([5])
        inputs = pack_padded_sequence(inputs, lengths, batch_first, layout == "packed")
    output, _ = call(rnn, inputs)
    output = output.data if layout.startswith("packed") else output
    found = gradients(weighted_sum([output.flatten()]), {"x": x})
    assert_close(found, truth, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_is_a_transposition(cell):
    rnn = make(cell, 4, 6, 2, bidirectional=True)
    other = make(cell, 4, 6, 2, batch_first=True, bidirectional=True)
    x = normal(5, 3, 4)
    states = initial_states(rnn, 3)
    output, finals = call(rnn, x, states)
    transposed, other_finals = call(other, x.transpose(0, 1), states)
    assert torch.equal(output, transposed.transpose(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(finals, other_finals, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_passes_both_ways(cell):
    rnn, ordinary = (
        make(cell, 4, 6, 2, bidirectional=True),
        ORDINARY[cell](4, 6, 2, bidirectional=True),
    )
    x = torch.empty(5, 0, 4, requires_grad=True)
    result = call(rnn, x)
    assert shapes_and_types(*result) == shapes_and_types(*call(ordinary, x))
    weighted_sum([result[0], *result[1]]).backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.abs().sum() == 0 for parameter in rnn.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_last_output_is_the_final_state(cell):
    rnn = make(cell, 4, 6, bidirectional=True)
    output, finals = call(rnn, normal(5, 3, 4))
    assert torch.equal(output[-1, :, :6], finals[0][0])
    assert torch.equal(output[0, :, 6:], finals[0][1])


@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_is_an_instance_of_what_it_replaces(cell):
    rnn = make(cell, 4, 6)
    assert isinstance(rnn, ORDINARY[cell])
    assert isinstance(rnn, nn.RNNBase)
    assert rnn.flatten_parameters() is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_parameters_carry_the_names_of_the_ordinary_layer(cell, bidirectional, bias):
    options = {"num_layers": 2, "bidirectional": bidirectional, "bias": bias}
    rnn, ordinary = make(cell, 4, 6, **options), ORDINARY[cell](4, 6, **options)
    names = [name for name, _ in ordinary.named_parameters()]
    assert [name for name, _ in rnn.named_parameters()] == names
    by_layer = [parameter for layer in rnn.all_weights for parameter in layer]
    assert all(a is b for a, b in zip(by_layer, rnn.parameters(), strict=True))


@pytest.mark.parametrize(
    ("bits", "gates"), [(3, {RevGRU: 3, RevLSTM: 5}), (0, {RevGRU: 3, RevLSTM: 3})]
)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_have_the_documented_shapes(cell, bits, gates):
    rnn = make(cell, 4, 6, 2, bidirectional=True, max_forget_bits=bits)
    rows = gates[cell] * 6
    assert rnn.weight_ih_l0.shape == (rows, 4)
    assert rnn.weight_ih_l1_reverse.shape == (rows, 12)
    assert rnn.weight_hh_l1.shape == (rows, 3)
    assert rnn.bias_hh_l0.shape == (rows,)


@pytest.mark.parametrize("cell", CELLS)
def test_parameters_start_uniform_within_one_over_the_root_of_the_width(cell):
    rnn = make(cell, 50, 64)
    for parameter in rnn.parameters():
        assert parameter.abs().max() <= 1 / 8
    weights = rnn.weight_ih_l0.detach()
    assert weights.abs().max() > 0.99 / 8
    assert weights.std() == pytest.approx(0.25 / 12**0.5, rel=0.02)


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_seed_gives_the_same_parameters_and_results(cell):
    first, second = (make(cell, 4, 6, 2, seed=5) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert torch.equal(call(first, normal(9, 3, 4))[0], call(second, normal(9, 3, 4))[0])
    third = make(cell, 4, 6, 2, seed=6)
    assert not torch.equal(first.weight_ih_l0, third.weight_ih_l0)


def through_torch(rnn):
    file = io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda rnn: pickle.loads(pickle.dumps(rnn)),
    "torch.save": through_torch,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_copy_computes_the_same_and_is_independent(cell, how):
    rnn = make(cell, 4, 6, 2, bidirectional=True, dropout=0.3, max_forget_bits=2.5, chunk_steps=3)
    rnn.eval()
    x = normal(9, 3, 4)
    output, _ = call(rnn, x)  # leaves a report behind, which must not hinder copying
    output.sum().backward()
    other = COPIES[how](rnn)
    assert repr(other) == repr(rnn)
    assert torch.equal(call(other, x)[0], output)
    with torch.no_grad():
        other.weight_hh_l1.add_(1)
    assert torch.equal(call(rnn, x)[0], output)
    assert not torch.equal(call(other, x)[0], output)


@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_carries_a_layer_over(cell):
    source, target = make(cell, 4, 6, 2, seed=1), make(cell, 4, 6, 2, seed=2)
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert torch.equal(call(source, normal(9, 3, 4))[0], call(target, normal(9, 3, 4))[0])
    assert set(source.state_dict()) == {name for name, _ in source.named_parameters()}


@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_converted_to_float64_computes_in_float64(cell):
    rnn = make(cell, 4, 6)
    narrow, _ = call(rnn, normal(9, 3, 4))
    rnn.to(torch.float64)
    wide, finals = call(rnn, normal(9, 3, 4).double())
    assert wide.dtype == finals[0].dtype == torch.float64
    assert (wide - narrow).abs().max() < 1e-2
    truth, _ = ReferenceRNN.of(rnn)(dict(rnn.named_parameters()), normal(9, 3, 4).double())
    assert torch.equal(wide, truth)


@pytest.mark.parametrize("cell", CELLS)
def test_a_bfloat16_layer_passes_both_ways(cell):
    rnn = make(cell, 4, 6, 2, dtype=torch.bfloat16)
    x = normal(9, 3, 4).bfloat16().requires_grad_()
    output, _ = call(rnn, x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad.dtype == rnn.weight_hh_l0.grad.dtype == torch.bfloat16


class Scaled(nn.Module):
    """A direction and a magnitude per row, like weight normalisation."""

    def forward(self, magnitude, direction):
        return magnitude * direction / direction.norm(dim=1, keepdim=True)

    def right_inverse(self, weight):
        return weight.norm(dim=1, keepdim=True), weight


@pytest.mark.parametrize("cell", CELLS)
def test_a_parametrization_of_the_recurrent_weight_takes_effect(cell):
    rnn = make(cell, 4, 6, dtype=torch.float64)
    x = normal(9, 3, 4, dtype=torch.float64)
    before, _ = call(rnn, x)
    register_parametrization(rnn, "weight_hh_l0", Scaled())
    magnitude, direction = rnn.parametrizations.weight_hh_l0.parameters()
    assert (call(rnn, x)[0] - before).abs().max() < 1e-2
    with torch.no_grad():
        magnitude.mul_(3)
    output, _ = call(rnn, x)
    assert (output - before).abs().max() > 1e-2

    named = {"magnitude": magnitude, "direction": direction}
    weight = magnitude * direction / direction.norm(dim=1, keepdim=True)
    parameters = dict(rnn.named_parameters()) | {"weight_hh_l0": weight}
    truth, _ = ReferenceRNN.of(make(cell, 4, 6))(parameters, x)
    found = gradients(weighted_sum([output]), named)
    assert_close(found, gradients(weighted_sum([truth]), named), 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_functional_call_uses_the_parameters_it_is_given(cell):
    rnn, other = make(cell, 4, 6, seed=1), make(cell, 4, 6, seed=2)
    x = normal(9, 3, 4)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    output, _ = functional_call(rnn, given, (x,))
    truth, _ = call(other, x)
    assert torch.equal(output, truth)
    assert not torch.equal(output, call(rnn, x)[0])
    found = gradients(weighted_sum([output]), given)
    assert_close(found, gradients(weighted_sum([truth]), dict(other.named_parameters())), 0.0)
    assert all(parameter.grad is None for parameter in rnn.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_acts_between_layers_in_training_only(cell):
    x = normal(9, 3, 4)
    single = make(cell, 4, 6, 1, dropout=0.5)
    assert torch.equal(call(single, x)[0], call(make(cell, 4, 6, 1), x)[0])

    stack, plain = make(cell, 4, 6, 2, dropout=0.5), make(cell, 4, 6, 2)
    truth, finals = call(plain, x)
    output, dropped_finals = call(stack, x)
    assert torch.equal(dropped_finals[0][0], finals[0][0]), "the first layer sees no dropout"
    assert not torch.equal(output, truth)
    assert torch.equal(output[-1], dropped_finals[0][1]), "the output has no dropout"
    stack.eval()
    assert torch.equal(call(stack, x)[0], truth)


@pytest.mark.parametrize("cell", CELLS)
def test_full_dropout_hides_the_first_layer(cell):
    rnn = make(cell, 4, 6, 2, dropout=1.0, dtype=torch.float64)
    x = normal(9, 3, 4, dtype=torch.float64).requires_grad_()
    output, _ = call(rnn, x)
    found = gradients(weighted_sum([output]), {**dict(rnn.named_parameters()), "x": x})
    assert found["x"].abs().max() == found["weight_hh_l0"].abs().max() == 0
    assert found["weight_hh_l1"].abs().max() > 0


@pytest.mark.parametrize("cell", CELLS)
def test_representation_shows_what_differs_from_the_defaults(cell):
    assert str(cell(4, 6)) == f"{cell.__name__}(4, 6, max_forget_bits=3.0)"
    rnn = cell(4, 6, 2, False, True, 0.5, True, max_forget_bits=None, chunk_steps=7)
    assert str(rnn) == (
        f"{cell.__name__}(4, 6, num_layers=2, bias=False, batch_first=True, dropout=0.5, "
        "bidirectional=True, chunk_steps=7, max_forget_bits=None)"
    )


@pytest.mark.parametrize("cell", CELLS)
def test_forgetting_beyond_any_limit_is_no_limit(cell):
    unlimited, infinite = (make(cell, 4, 6, max_forget_bits=b) for b in (None, float("inf")))
    assert torch.equal(call(unlimited, normal(9, 3, 4))[0], call(infinite, normal(9, 3, 4))[0])


@pytest.mark.parametrize("bits", [1, 2, 2.5, None])
@pytest.mark.parametrize("cell", CELLS)
def test_no_unit_forgets_more_than_the_limit(cell, bits):
    rnn = make(cell, 4, 6, max_forget_bits=bits)
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(-1000)
    call(rnn, normal(9, 3, 4))
    used = memory_report(rnn).layers[0].gate_counts.nonzero().flatten().tolist()
    assert used == [1 if bits is None else -int(-1024 * 2**-bits // 1)]


@pytest.mark.parametrize("cell", CELLS)
def test_forget_bias_moves_the_forget_gates_and_nothing_else(cell):
    plain, forgetful = (make(cell, 4, 6, 2, forget_bias=bias) for bias in (0.0, -3.0))
    gates = {RevGRU: (3, [1]), RevLSTM: (5, [0, 1])}[cell]
    for name, value in plain.named_parameters():
        expected = value.detach().clone()
        if name.startswith("bias_ih"):
            expected.view(2, gates[0], 3)[:, gates[1]] -= 3.0
        assert torch.equal(dict(forgetful.named_parameters())[name], expected)
    for options in ({"max_forget_bits": 0}, {"bias": False}):
        with pytest.raises(ValueError, match="forget_bias=-3.0 needs forget gates with a bias"):
            cell(4, 6, forget_bias=-3.0, **options)
