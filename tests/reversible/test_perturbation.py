"""Perturbed recurrent weights: the layer computes what every sequence's own weights compute."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_revflip.reversible import (
    RecurrentPerturbation,
    ReversalError,
    RevLSTM,
    memory_report,
)
from lightning_revflip.reversible.kernels import fastest, torch_only
from tests.helpers.passes import (
    CELLS,
    assert_close,
    call,
    gradients,
    initial_states,
    make,
    normal,
    recovered_states,
    saved_by,
    weighted_sum,
)
from tests.helpers.perturbed_layers import DELTA, explicit_weights, perturbed, plain
from tests.helpers.reference_cell import ReferenceRNN

BITS = [1, 3, None, 0]
DOUBLE = 1e-9
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
)


def named_tensors(rnn, x, states=()):
    named = {**dict(rnn.named_parameters()), "x": x}
    return named | {f"state_{i}": state for i, state in enumerate(states)}


def double(*shape):
    return normal(*shape, dtype=torch.float64).requires_grad_()


def run_ragged(rnn, x, states, lengths):
    """Output, zero behind the end of each sequence, and final states."""
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, finals = call(rnn, packed, states)
    return pad_packed_sequence(output, total_length=len(x))[0], finals


def assert_agrees(rnn, x, states=(), lengths=None):
    """Outputs are bit for bit those of the plain cell with explicit weights, gradients to 1e-9."""
    if lengths is None:
        output, finals = call(rnn, x, states)
    else:
        output, finals = run_ragged(rnn, x, states, lengths)
    weights = explicit_weights(rnn, x.shape[1])
    truth, true_finals = ReferenceRNN.of(rnn)(weights, x, states, lengths)
    assert torch.equal(output, truth)
    assert all(torch.equal(a, b) for a, b in zip(finals, true_finals, strict=True))
    named = named_tensors(rnn, x, states)
    found = gradients(weighted_sum([output, *finals]), named)
    assert_close(found, gradients(weighted_sum([truth, *true_finals]), named), DOUBLE)
    return found


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_autograd_through_explicit_weights(cell, bits):
    rnn = perturbed(cell, 5, 8, max_forget_bits=bits, chunk_steps=4, dtype=torch.float64)
    found = assert_agrees(rnn, double(25, 3, 5), initial_states(rnn, 3))
    assert {"weight_hh_l0", "delta_l0", "x", "state_0"} <= set(found)


@pytest.mark.parametrize("bits", [3, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_in_a_bidirectional_stack_over_ragged_sequences(cell, bits):
    options = {"bidirectional": True, "max_forget_bits": bits, "chunk_steps": 5}
    rnn = perturbed(cell, 4, 6, 2, dtype=torch.float64, **options)
    assert_agrees(rnn, double(17, 4, 4), initial_states(rnn, 4), lengths=[3, 17, 1, 12])
    assert rnn.calls == ["l0", "l0_reverse", "l1", "l1_reverse"], "once each, and not in backward"


@pytest.mark.parametrize("implementation", ["torch", NATIVE])
@pytest.mark.parametrize("cell", CELLS)
def test_float32_gradients_agree_with_every_kernel(cell, implementation, monkeypatch):
    """The plain cell is told how gates were rounded: a flipped one is no error of gradients."""
    rnn = perturbed(cell, 24, 40)
    x = normal(40, 9, 24).requires_grad_()
    gates = []
    with torch_only() if implementation == "torch" else nullcontext():
        kind = type(fastest(rnn.cell, x.device, x.dtype))
        assert ("Native" in kind.__name__) == (implementation == "native")
        forget_gates = kind.forget_gates

        def recording(self, activations):
            integers = forget_gates(self, activations)
            gates.extend(integers.clone().chunk(self.states, dim=1))
            return integers

        monkeypatch.setattr(kind, "forget_gates", recording)
        output, finals = call(rnn, x)
    reference = replace(ReferenceRNN.of(rnn), imposed=iter(gates))
    truth, true_finals = reference(explicit_weights(rnn, 9), x)
    torch.testing.assert_close(output, truth, rtol=0, atol=2e-5)
    named = named_tensors(rnn, x)
    found = gradients(weighted_sum([output, *finals]), named)
    assert_close(found, gradients(weighted_sum([truth, *true_finals]), named), 1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_every_sequence_runs_as_alone_with_its_own_weights(cell):
    rnn = perturbed(cell, 4, 6, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = double(9, 4, 4).detach(), [5, 9, 1, 7]
    states = [state.detach() for state in initial_states(rnn, 4)]
    with torch.no_grad():
        output, finals = run_ragged(rnn, x, states, lengths)
        alone = plain(rnn)
        for n, (length, weights) in enumerate(zip(lengths, per_sequence(rnn, 4), strict=True)):
            alone.load_state_dict(weights)
            single, single_finals = call(
                alone, x[:length, n : n + 1], [state[:, n : n + 1] for state in states]
            )
            assert torch.equal(output[:length, n : n + 1], single)
            for final, single_final in zip(finals, single_finals, strict=True):
                assert torch.equal(final[:, n : n + 1], single_final)


def per_sequence(rnn, batch):
    weights = explicit_weights(rnn, batch)
    return [
        {name: w[n] if name.startswith("weight_hh") else w for name, w in weights.items()}
        for n in range(batch)
    ]


@pytest.mark.parametrize("cell", CELLS)
def test_sequences_with_the_same_input_differ(cell):
    rnn = perturbed(cell, 4, 20)
    output, _ = call(rnn, normal(5, 1, 4).expand(5, 8, 4))
    assert torch.equal(output[0, 0, :10], output[0, 1, :10]), "the first half-step sees zeros"
    assert len(output[-1].unique(dim=0)) == 8


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_and_unbatched_inputs_are_perturbed_likewise(cell):
    rnn = perturbed(cell, 4, 6, dtype=torch.float64)
    x = double(7, 3, 4).detach()
    output, _ = call(rnn, x)
    single, _ = call(rnn, x[:, :1])
    unbatched, _ = call(rnn, x[:, 0])
    assert torch.equal(unbatched, single.squeeze(1))
    rnn.batch_first = True
    assert torch.equal(call(rnn, x.transpose(0, 1))[0], output.transpose(0, 1))


@pytest.mark.parametrize("cell", CELLS)
def test_a_perturbation_that_depends_on_the_weights_passes_gradients_to_them(cell):
    """Multiplicative noise: dW = W * noise."""
    rnn, x = perturbed(cell, 4, 6, dtype=torch.float64), double(9, 3, 4)
    noise = 0.3 * normal(*rnn.weight_hh_l0.shape, seed=9, dtype=torch.float64)
    signs = rnn.signs_of("l0", 3)

    def multiplicative(suffix, weight_hh, batch):
        return RecurrentPerturbation(weight_hh * noise, *signs)

    rnn.recurrent_perturbation = multiplicative
    found = gradients(weighted_sum([call(rnn, x)[0]]), {"w": rnn.weight_hh_l0, "x": x})
    del rnn.delta_l0
    rnn.delta_l0 = rnn.weight_hh_l0 * noise
    truth, _ = ReferenceRNN.of(rnn)(explicit_weights(rnn, 3), x)
    assert_close(found, gradients(weighted_sum([truth]), {"w": rnn.weight_hh_l0, "x": x}), DOUBLE)


@pytest.mark.parametrize("cell", CELLS)
def test_a_frozen_perturbation_changes_no_other_gradient(cell):
    rnn, x = perturbed(cell, 4, 6, 2), normal(9, 3, 4).requires_grad_()
    truth = gradients(weighted_sum([call(rnn, x)[0]]), named_tensors(rnn, x))
    rnn.delta_l0.requires_grad_(False)
    found = gradients(weighted_sum([call(rnn, x)[0]]), named_tensors(rnn, x))
    del truth["delta_l0"]
    assert_close(found, truth, 0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_only_the_perturbation_need_require_a_gradient(cell):
    rnn, x = perturbed(cell, 4, 6), normal(9, 3, 4)
    truth = gradients(weighted_sum([call(rnn, x)[0]]), dict(rnn.named_parameters()))
    for name, parameter in rnn.named_parameters():
        parameter.requires_grad_(name.startswith(DELTA))
    found = gradients(weighted_sum([call(rnn, x)[0]]), dict(rnn.named_parameters()))
    assert_close(found, {"delta_l0": truth["delta_l0"]}, 0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_without_signs_the_perturbation_is_added_to_the_weights(cell):
    rnn, x = perturbed(cell, 4, 6), normal(9, 3, 4)
    rnn.recurrent_perturbation = lambda *_: RecurrentPerturbation(rnn.delta_l0)
    moved = plain(rnn)
    with torch.no_grad():
        moved.weight_hh_l0 += rnn.delta_l0
    output, expected = call(rnn, x)[0], call(moved, x)[0]
    assert torch.equal(output, expected)
    found = gradients(weighted_sum([output]), dict(rnn.named_parameters()))
    truth = gradients(weighted_sum([expected]), dict(moved.named_parameters()))
    truth["delta_l0"] = truth["weight_hh_l0"]
    assert_close(found, truth, 0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_without_a_perturbation_a_layer_is_the_plain_one_bit_for_bit(cell):
    rnn, x = perturbed(cell, 4, 6, 2, bidirectional=True), normal(20, 3, 4)
    rnn.recurrent_perturbation = lambda *_: None
    for layer in (rnn, expected := plain(rnn)):
        output, finals = call(layer, x)
        weighted_sum([output, *finals]).backward()
    for name, parameter in expected.named_parameters():
        assert torch.equal(getattr(rnn, name).grad, parameter.grad)
    assert memory_report(rnn).kept_bytes == memory_report(expected).kept_bytes


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_under_no_grad_are_the_same_bits(cell):
    rnn, x = perturbed(cell, 4, 6, 2), normal(20, 3, 4)
    output, _ = call(rnn, x)
    with torch.no_grad():
        assert torch.equal(call(rnn, x)[0], output)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_gradients_point_where_those_of_float32_do(cell):
    rnn, x = perturbed(cell, 20, 30, 2), normal(30, 8, 20).requires_grad_()
    named = named_tensors(rnn, x)
    truth = gradients(weighted_sum([call(rnn, x)[0]]), named)
    with torch.autocast("cpu", torch.bfloat16), recovered_states() as passes:
        output, _ = call(rnn, x)
        found = gradients(weighted_sum([output]), named)
    assert output.dtype == torch.bfloat16
    assert all(found[name].dtype == named[name].dtype for name in found)
    assert all(recovered.empty for recovered in passes)
    assert_close(found, truth, 0.06)  # bfloat16 keeps 8 bits, here of two products per gate


@pytest.mark.parametrize("cell", CELLS)
def test_backward_can_run_twice(cell):
    rnn, x = perturbed(cell, 4, 6), normal(9, 3, 4).requires_grad_()
    named, loss = named_tensors(rnn, x), weighted_sum([call(rnn, x)[0]])
    first = gradients(loss, named, retain_graph=True)
    assert_close(gradients(loss, named), first, 0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_a_perturbation_changed_before_backward_is_noticed(cell):
    rnn = perturbed(cell, 4, 6)
    loss = weighted_sum([call(rnn, normal(20, 3, 4))[0]])
    rnn.delta_l0.data.add_(0.1)
    with pytest.raises(ReversalError):
        loss.backward()


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_kept_bytes_are_those_of_the_saved_tensors(cell, bits):
    rnn = perturbed(cell, 20, 30, bias=False, max_forget_bits=bits)
    x = normal(70, 8, 20)
    _, saved = saved_by(lambda: call(rnn, x))
    known = {tensor.data_ptr() for tensor in (x, *rnn.parameters())}
    kept = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known)
    assert kept == memory_report(rnn).kept_bytes


@pytest.mark.parametrize("cell", CELLS)
def test_a_perturbation_keeps_a_byte_per_sign_however_long_the_sequence(cell):
    rnn = perturbed(cell, 20, 30, max_forget_bits=0)
    ordinary = plain(rnn)
    for steps in (10, 100):
        for layer in (rnn, ordinary):
            call(layer, normal(steps, 8, 20))
        extra = memory_report(rnn).kept_bytes - memory_report(ordinary).kept_bytes
        assert extra == 8 * (30 + len(rnn.weight_hh_l0))
    with torch.no_grad():
        call(rnn, normal(10, 8, 20))
    assert memory_report(rnn).kept_bytes == 0


# --- errors --------------------------------------------------------------------------------------


def run_with(make_perturbation):
    rnn = make(RevLSTM, 4, 6)
    rnn.recurrent_perturbation = lambda suffix, weight, batch: make_perturbation(weight)
    return call(rnn, normal(5, 3, 4))


def test_signs_come_in_pairs():
    with pytest.raises(ValueError, match=r"signs_in and signs_out together, signs_out is missing"):
        run_with(lambda w: RecurrentPerturbation(w, torch.ones(3, 6)))
    with pytest.raises(ValueError, match="signs_in is missing"):
        run_with(lambda w: RecurrentPerturbation(w, signs_out=torch.ones(3, 30)))


@pytest.mark.parametrize(
    "change",
    [lambda w: w.t(), lambda w: w.double(), lambda w: w.to("meta")],
    ids=["shape", "dtype", "device"],
)
def test_a_perturbation_of_another_kind_than_the_weights_is_refused(change):
    message = r"perturbation of weight_hh_l0 must have its shape \(30, 3\), torch.float32 and cpu"
    with pytest.raises(ValueError, match=message):
        run_with(lambda w: RecurrentPerturbation(change(w)))


@pytest.mark.parametrize(
    ("field", "shape", "expected"),
    [("signs_in", (3, 30), "(3, 6)"), ("signs_out", (2, 30), "(3, 30)")],
)
def test_signs_of_another_shape_are_refused(field, shape, expected):
    signs = {"signs_in": torch.ones(3, 6), "signs_out": torch.ones(3, 30)}
    signs[field] = torch.ones(shape)
    with pytest.raises(
        ValueError, match=rf"{field} .* must have shape \({expected[1:-1]}\), a row"
    ):
        run_with(lambda w: RecurrentPerturbation(w, **signs))


@pytest.mark.parametrize(
    "signs",
    [torch.zeros(3, 6), torch.full((3, 6), 0.5), torch.ones(3, 6).bool()],
    ids=["zero", "a half", "bool"],
)
def test_signs_other_than_one_are_refused(signs):
    with pytest.raises(ValueError, match=r"signs_in .* must hold \+1 and -1 only, got other"):
        run_with(lambda w: RecurrentPerturbation(w, signs, torch.ones(3, 30)))


def test_integer_signs_are_accepted():
    signs = torch.ones(3, 6).char(), -torch.ones(3, 30).long()
    output, _ = run_with(lambda w: RecurrentPerturbation(0.5 * w, *signs))
    expected, _ = run_with(lambda w: RecurrentPerturbation(-0.5 * w))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_perturbation_that_is_not_finite_is_named(value):
    signs = torch.ones(3, 6), torch.ones(3, 30)
    with pytest.raises(ValueError, match="NaN or infinity in the recurrent perturbation"):
        run_with(lambda w: RecurrentPerturbation(torch.full_like(w, value), *signs))


def test_an_ordinary_layer_asks_for_no_perturbation():
    rnn = make(RevLSTM, 4, 6)
    assert isinstance(rnn, nn.LSTM)
    assert rnn.recurrent_perturbation("l0", rnn.weight_hh_l0, 3) is None
