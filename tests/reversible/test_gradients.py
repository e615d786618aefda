"""Gradients are those of autograd through the plain cell (`tests/helpers/reference_cell.py`)."""

import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_revflip.reversible.kernels import fastest, torch_only
from lightning_revflip.reversible.kernels.native import sigmoid
from lightning_revflip.reversible.kernels.native_cells import NativeStorage
from tests.helpers.exact_arithmetic import ExactArithmetic
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

BITS = [1, 2.5, 3, None, 0]
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
)


def everything(output, finals):
    return [output, *finals]


def named_tensors(rnn, x, states):
    named = {**dict(rnn.named_parameters()), "x": x}
    return named | {f"state_{i}": state for i, state in enumerate(states)}


def assert_agrees(rnn, x, states=(), lengths=None, use=everything, tolerance=1e-10):
    """Outputs are the reference's bit for bit, gradients within a relative error.

    Args:
        rnn: without batch_first.
        x: (steps, batch, features).
        states: initial h (and c), or none.
        lengths: of the sequences, if they are to be packed.
        use: which of output and final states the loss depends on.
        tolerance: of gradients.
    """
    named = named_tensors(rnn, x, states)
    if lengths is None:
        output, finals = call(rnn, x, states)
    else:
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        output, finals = call(rnn, packed, states)
        output, _ = pad_packed_sequence(output, total_length=len(x))
    parameters = dict(rnn.named_parameters())
    truth, true_finals = ReferenceRNN.of(rnn)(parameters, x, states, lengths)

    assert torch.equal(output, truth)
    assert all(torch.equal(a, b) for a, b in zip(finals, true_finals, strict=True))
    found = gradients(weighted_sum(use(output, finals)), named)
    true_gradients = gradients(weighted_sum(use(truth, true_finals)), named)
    assert_close(found, true_gradients, tolerance)
    return found


def double(*shape):
    return normal(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_with_autograd_through_the_plain_cell(cell, bits):
    rnn = make(cell, 5, 8, max_forget_bits=bits, chunk_steps=4, dtype=torch.float64)
    found = assert_agrees(rnn, double(25, 3, 5), initial_states(rnn, 3))
    assert {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "x", "state_0"} <= set(
        found
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_in_a_bidirectional_stack_over_ragged_sequences(cell, bits):
    rnn = make(
        cell, 4, 6, 3, bidirectional=True, max_forget_bits=bits, chunk_steps=5, dtype=torch.float64
    )
    assert_agrees(rnn, double(17, 4, 4), initial_states(rnn, 4), lengths=[3, 17, 1, 12])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_from_the_default_state(cell, bits):
    rnn = make(cell, 4, 6, 2, max_forget_bits=bits, dtype=torch.float64)
    assert_agrees(rnn, double(12, 3, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_without_bias(cell):
    rnn = make(cell, 4, 6, 2, bias=False, bidirectional=True, dtype=torch.float64)
    assert_agrees(rnn, double(12, 3, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_where_every_gate_saturates(cell):
    rnn = make(cell, 4, 6, max_forget_bits=None, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.mul_(30)
        rnn.weight_hh_l0.mul_(10)
    assert_agrees(rnn, double(30, 3, 4), initial_states(rnn, 3, scale=20.0))


LOSSES = {
    "h_n only": lambda output, finals: finals[:1],
    "last final state only": lambda output, finals: finals[-1:],
    "output only": lambda output, finals: [output],
    "last step only": lambda output, finals: [output[-1]],
    "some steps": lambda output, finals: [output[2:5, 1:], finals[0][:, 0]],
    "one unit": lambda output, finals: [output[:, :, 2]],
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_for_a_loss_that_uses_part_of_the_outputs(cell, loss):
    rnn = make(cell, 4, 6, 2, bidirectional=True, dtype=torch.float64)
    assert_agrees(rnn, double(9, 3, 4), initial_states(rnn, 3), use=LOSSES[loss])


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_where_the_input_requires_none(cell):
    rnn = make(cell, 4, 6, 2, dtype=torch.float64)
    found = assert_agrees(rnn, double(9, 3, 4).detach())
    assert "x" not in found


FROZEN = {
    "recurrent weights": ["weight_hh_l0", "weight_hh_l1"],
    "input weights": ["weight_ih_l0", "weight_ih_l1"],
    "biases": ["bias_ih_l0", "bias_hh_l0"],
    "first layer": ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"],
    "all but one": ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "weight_hh_l1", "bias_hh_l1"],
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_where_some_parameters_are_frozen(cell, frozen):
    rnn = make(cell, 4, 6, 2, dtype=torch.float64)
    for name in FROZEN[frozen]:
        getattr(rnn, name).requires_grad_(False)
    found = assert_agrees(rnn, double(9, 3, 4).detach())
    assert not set(FROZEN[frozen]) & set(found)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_reaches_a_state_through_frozen_parameters(cell):
    rnn = make(cell, 4, 6, dtype=torch.float64).requires_grad_(False)
    found = assert_agrees(rnn, double(9, 3, 4).detach(), initial_states(rnn, 3))
    assert set(found) <= {"state_0", "state_1"}


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_a_single_step_agrees(cell):
    rnn = make(cell, 4, 6, dtype=torch.float64)
    assert_agrees(rnn, double(1, 1, 4), initial_states(rnn, 1))


@pytest.mark.parametrize("bits", [3, None])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("implementation", ["torch", NATIVE])
def test_float32_gradients_agree_at_seventy_steps_and_three_hundred_units(
    cell, bits, implementation, monkeypatch
):
    monkeypatch.setattr(NativeStorage, "lanes", None)  # one buffer per unit, as the plain cell has
    rnn = make(cell, 200, 300, max_forget_bits=bits)
    x = normal(70, 20, 200).requires_grad_()
    with ExitStack() as stack:
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if implementation == "torch":
            stack.enter_context(torch_only())
        stack.enter_context(ExactArithmetic(sigmoid if implementation == "native" else None))
        assert_agrees(rnn, x, initial_states(rnn, 20), tolerance=1e-5)


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("cell", CELLS)
def test_float32_gradients_agree_in_the_arithmetic_that_users_run(
    cell, implementation, monkeypatch
):
    """As above with oneDNN and compiled cells; the plain cell is told how gates were rounded."""
    rnn = make(cell, 200, 300)
    x = normal(70, 20, 200).requires_grad_()
    gates = []
    kind = type(rnn.cell)
    with torch_only() if implementation == "torch" else nullcontext():
        kind = type(fastest(rnn.cell, x.device, x.dtype))
        forget_gates = kind.forget_gates

        def recording(self, activations):
            integers = forget_gates(self, activations)
            gates.extend(integers.clone().chunk(self.states, dim=1))
            return integers

        monkeypatch.setattr(kind, "forget_gates", recording)
        output, finals = call(rnn, x)
    reference = replace(ReferenceRNN.of(rnn), imposed=iter(gates))
    truth, true_finals = reference(dict(rnn.named_parameters()), x)
    torch.testing.assert_close(output, truth, rtol=0, atol=2e-5)
    named = named_tensors(rnn, x, ())
    found = gradients(weighted_sum([output, *finals]), named)
    assert_close(found, gradients(weighted_sum([truth, *true_finals]), named), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_float32_gradients_differ_by_flipped_gates_at_most_in_native_arithmetic(cell):
    """A gate that is rounded the other way is wrong by 1e-3, some in a hundred thousand are."""
    rnn = make(cell, 200, 300)
    x = normal(70, 20, 200).requires_grad_()
    output, finals = call(rnn, x)
    truth, true_finals = ReferenceRNN.of(rnn)(dict(rnn.named_parameters()), x)
    named = named_tensors(rnn, x, ())
    found = gradients(weighted_sum([output, *finals]), named)
    assert_close(found, gradients(weighted_sum([truth, *true_finals]), named), 1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_gradients_point_where_those_of_float32_do(cell):
    rnn = make(cell, 20, 30, 2)
    x = normal(30, 8, 20).requires_grad_()
    named = named_tensors(rnn, x, ())
    truth = gradients(weighted_sum([call(rnn, x)[0]]), named)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = call(rnn, x)
    assert output.dtype == torch.bfloat16
    found = gradients(weighted_sum([output]), named)
    assert all(found[name].dtype == named[name].dtype for name in found)
    assert_close(found, truth, 0.05)
