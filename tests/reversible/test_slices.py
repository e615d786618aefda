"""A HiddenSlice returns the exact first units of h, in place of the bits that they forget."""

from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_revflip.reversible import (
    HiddenSlice,
    ReversalError,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
    memory_report,
)
from lightning_revflip.reversible.buffer import information_bits
from lightning_revflip.reversible.kernels import torch_only
from lightning_revflip.reversible.kernels.native import LIBRARY, sigmoid
from lightning_revflip.reversible.kernels.native_cells import NativeStorage
from tests.helpers.exact_arithmetic import ExactArithmetic
from tests.helpers.passes import (
    CELLS,
    assert_close,
    gradients,
    initial_states,
    make,
    normal,
    recovered_states,
    saved_by,
    weighted_sum,
)
from tests.helpers.properties import examples
from tests.helpers.reference_cell import ReferenceRNN
from tests.helpers.sequences import as_parts, as_state

BITS = [0, 1, 3, 5, None]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
PRECISIONS = ["float64", "float32", "float32 by torch", "bfloat16"]


def sliced(cell, units, *args, chunk_steps=3, **kwargs):
    """A sequence that puts the first units of h out, with parameters that depend on nothing else.

    The arguments are those of the layer, which is called with what the sequence is.
    """
    rnn = make(cell, *args, **kwargs)
    return ReversibleSequence(nn.Identity(), rnn, HiddenSlice(units), chunk_steps=chunk_steps)


def packed(x, lengths):
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)


def unpacked(output, steps):
    """(steps, batch, units), zero behind the end of a sequence."""
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, total_length=steps)
    return output


@st.composite
def passes(draw):
    """Everything that a user can choose; the number of units is any, also across the halves."""
    hidden_size = 2 * draw(st.integers(1, 5))
    batch = draw(st.integers(1, 4))
    steps = draw(st.integers(1, 14))
    ragged = st.lists(st.integers(1, steps), min_size=batch, max_size=batch)
    return {
        "cell": draw(st.sampled_from(CELLS)),
        "units": draw(st.integers(0, hidden_size)),
        "hidden_size": hidden_size,
        "num_layers": draw(st.integers(1, 2)),
        "max_forget_bits": draw(st.sampled_from(BITS)),
        "batch": batch,
        "steps": steps,
        "lengths": draw(st.none() | ragged),
        "chunk_steps": draw(st.integers(1, 15)),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "seed": draw(st.integers(0, 1000)),
    }


def arranged(case, scale=1.0):
    """Sequence, padded input, the input to give, and initial states of a case."""
    dtype = torch.float64 if case["precision"] == "float64" else torch.float32
    names = ("hidden_size", "num_layers", "max_forget_bits", "seed", "chunk_steps")
    options = {name: case[name] for name in names}
    sequence = sliced(case["cell"], case["units"], 3, dtype=dtype, **options)
    x = normal(case["steps"], case["batch"], 3, seed=case["seed"], dtype=dtype).requires_grad_()
    states = initial_states(sequence.rnns[0], case["batch"], scale, seed=case["seed"])
    return sequence, x, x if case["lengths"] is None else packed(x, case["lengths"]), states


def assert_recovers(case, scale=1.0):
    """The backward pass arrives at the given states, bit for bit, with empty buffers."""
    sequence, _, inputs, states = arranged(case, scale)
    autocast = case["precision"] == "bfloat16"
    with torch_only() if "torch" in case["precision"] else nullcontext():
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output, final = sequence(inputs, as_state(states))
        data = output if case["lengths"] is None else output.data
        with recovered_states() as found:
            weighted_sum([data, *as_parts(final)]).backward()
    order = range(case["batch"])
    if case["lengths"] is not None:
        order = inputs.sorted_indices.tolist()
    scale = ReferenceRNN.of(sequence.rnns[0]).scale
    assert len(found) == case["num_layers"]
    for layer, recovered in enumerate(reversed(found)):
        assert recovered.empty
        for state, given_state in zip(recovered.states, states, strict=True):
            truth = given_state[layer][list(order)].detach().double()
            assert torch.equal(state, (truth * scale).round() / scale)


@given(passes())
@examples(max_examples=60)
def test_backward_recovers_the_initial_state_bit_for_bit(case):
    assert_recovers(case)


@pytest.mark.slow
@given(passes())
@examples(max_examples=600)
def test_backward_recovers_the_initial_state_in_many_cases(case):
    assert_recovers(case)


@given(passes(), st.sampled_from(["float32", "float32 by torch", "bfloat16"]))
@examples(max_examples=25)
def test_states_with_more_digits_than_float32_are_recovered(case, precision):
    case = case | {"cell": RevLSTM, "precision": precision}
    assert_recovers(case, scale=400.0)


def assert_agrees(case, scale=1.0):
    """Slices and final states are the plain cell's bit for bit, gradients but for rounding."""
    sequence, x, inputs, states = arranged(case, scale)
    rnn, native = sequence.rnns[0], case["precision"] == "float32" and LIBRARY.available
    named = dict(rnn.named_parameters()) | {"x": x}
    named |= {f"state_{i}": state for i, state in enumerate(states)}
    with ExitStack() as stack:
        if case["precision"] != "float64":
            stack.enter_context(patch.object(NativeStorage, "lanes", None))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            if not native:
                stack.enter_context(torch_only())
            forgets = case["max_forget_bits"] != 0  # else torch runs the cell in any case
            stack.enter_context(ExactArithmetic(sigmoid if native and forgets else None))
        output, final = sequence(inputs, as_state(states))
        output, finals = unpacked(output, case["steps"]), as_parts(final)
        reference = ReferenceRNN.of(rnn, sliced=case["units"])
        truth, true_finals = reference(
            dict(rnn.named_parameters()), x, states, case["lengths"] or None
        )
        truth = truth[..., : case["units"]]
        assert torch.equal(output, truth)
        assert all(torch.equal(a, b) for a, b in zip(finals, true_finals, strict=True))
        found = gradients(weighted_sum([output, *finals]), named)
        true_gradients = gradients(weighted_sum([truth, *true_finals]), named)
    assert_close(found, true_gradients, TOLERANCES[x.dtype])


@given(passes())
@examples(max_examples=60)
def test_slices_and_gradients_agree_with_the_plain_cell_in_float64(case):
    assert_agrees(case | {"precision": "float64"})


@given(passes(), st.sampled_from(["float32", "float32 by torch"]))
@examples(max_examples=40)
def test_slices_and_gradients_agree_with_the_plain_cell_in_float32(case, precision):
    assert_agrees(case | {"precision": precision})


@given(passes(), st.sampled_from(["float64", "float32", "float32 by torch"]))
@examples(max_examples=25)
def test_slices_and_gradients_agree_where_states_have_more_digits_than_float32(case, precision):
    assert_agrees(case | {"cell": RevLSTM, "precision": precision}, scale=400.0)


@pytest.mark.slow
@given(passes())
@examples(max_examples=400)
def test_slices_and_gradients_agree_with_the_plain_cell_in_many_cases(case):
    if case["precision"] != "bfloat16":
        assert_agrees(case)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_slices_of_padded_batches_have_their_layout(cell, batch_first):
    sequence = sliced(cell, 5, 3, 8, batch_first=batch_first, dtype=torch.float64)
    x = normal(2, 7, 3, dtype=torch.float64)
    output, _ = sequence(x if batch_first else x.transpose(0, 1))
    reference = ReferenceRNN.of(sequence.rnns[0], sliced=5)
    truth, _ = reference(dict(sequence.rnns[0].named_parameters()), x.transpose(0, 1))
    assert torch.equal(output, truth[..., :5].transpose(0, 1) if batch_first else truth[..., :5])


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [9, 2, 4]])
@pytest.mark.parametrize("units", [0, 1, 5, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_the_slices_own_their_memory_and_no_more(cell, units, lengths):
    sequence = sliced(cell, units, 3, 8)
    x = normal(9, 3, 3)
    output, _ = sequence(x if lengths is None else packed(x, lengths))
    data = output if lengths is None else output.data
    rows = 27 if lengths is None else 15
    assert data.untyped_storage().nbytes() == 4 * rows * units


@pytest.mark.parametrize("cell", CELLS)
def test_the_graph_keeps_nothing_of_the_size_of_all_states(cell):
    rows, units, hidden = 40 * 3, 4, 16
    sequence = sliced(cell, units, 3, hidden, 2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in sequence.parameters()}
    (output, _), saved = saved_by(lambda: sequence(normal(40, 3, 3)))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sizes[output.untyped_storage().data_ptr()] == 4 * rows * units
    assert max(sizes[address] for address in sizes.keys() - weights) < 4 * rows * hidden / 2
    words = sum(t.numel() for t in saved if t.dtype == torch.int16)
    assert 16 * words < 32 * rows * hidden / 4


@pytest.mark.parametrize("units", [0, 3, 4, 7, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_the_report_counts_the_gates_of_all_other_units(cell, units):
    sequence = sliced(cell, units, 3, 8, 2, dtype=torch.float64)
    x = normal(20, 4, 3, dtype=torch.float64)
    _, saved = saved_by(lambda: sequence(x))
    reference = ReferenceRNN.of(sequence.rnns[0], sliced=units)
    reference(dict(sequence.rnns[0].named_parameters()), x)
    gates = torch.cat([gate.flatten() for gate in reference.forgotten])
    counts = torch.bincount(gates, minlength=1025)
    report = memory_report(sequence)
    assert torch.equal(sum(layer.gate_counts for layer in report.layers), counts)
    assert report.information_bits == pytest.approx(information_bits(counts), rel=1e-12)
    assert [layer.slice_bits for layer in report.layers] == [0, 64 * 20 * 4 * units]
    words = sum(t.numel() for t in saved if t.dtype == torch.int16)
    states = 2 * 4 * 8 * (1 if cell is RevGRU else 2)
    assert report.stored_bits == 16 * words + 32 * states
    final_states = 4 * states
    assert report.kept_bytes == (report.stored_bits + report.slice_bits) // 8 + final_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gru_that_is_kept_whole_stores_no_words(dtype):
    sequence = sliced(RevGRU, 8, 3, 8, max_forget_bits=None, dtype=dtype)
    (_, _), saved = saved_by(lambda: sequence(normal(50, 4, 3, dtype=dtype)))
    assert not sum(t.numel() for t in saved if t.dtype == torch.int16)
    assert memory_report(sequence).information_bits == 0


@pytest.mark.parametrize("cell", CELLS)
def test_each_kept_unit_takes_its_share_of_the_stored_words(cell):
    stored = []
    for units in (0, 8, 16):
        sequence = sliced(cell, units, 3, 16)
        sequence(normal(200, 4, 3))
        report = memory_report(sequence)
        stored.append(report.stored_bits)
        assert report.stored_bits == pytest.approx(report.information_bits, rel=0.1, abs=4096)
    assert stored[0] - stored[1] == pytest.approx(stored[1] - stored[2], rel=0.2)


# --- precision and modes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_bits_are_the_same_and_nothing_is_stored(cell, dtype):
    sequence = sliced(cell, 5, 3, 8, 2, dtype=dtype)
    x = normal(9, 3, 3, dtype=dtype)
    output, final = sequence(x)
    with torch.no_grad():
        again, final_again = sequence(x)
    assert torch.equal(output, again)
    assert all(map(torch.equal, as_parts(final), as_parts(final_again)))
    assert not again.requires_grad
    report = memory_report(sequence)
    assert report.stored_bits == report.slice_bits == report.kept_bytes == 0


@pytest.mark.parametrize("cell", CELLS)
def test_slices_are_whole_states_under_autocast(cell):
    """Float32, not rounded to bfloat16: the last of them are the final state."""
    sequence = sliced(cell, 5, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, final = sequence(normal(9, 3, 3))
    assert output.dtype == torch.float32
    assert torch.equal(output[-1], as_parts(final)[0][0][:, :5])


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_gradients_point_where_those_of_float32_do(cell):
    sequence = sliced(cell, 12, 20, 30)
    x = normal(20, 8, 20).requires_grad_()
    named = dict(sequence.named_parameters()) | {"x": x}
    truth = gradients(weighted_sum([sequence(x)[0]]), named)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = sequence(x)
    assert_close(gradients(weighted_sum([output]), named), truth, 0.05)


@pytest.mark.parametrize("use", ["slices", "final state", "nothing but one step"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_agree_for_a_loss_that_uses_part_of_the_results(cell, use):
    sequence = sliced(cell, 5, 3, 8, 2, dtype=torch.float64)
    x = normal(9, 3, 3, dtype=torch.float64).requires_grad_()
    named = dict(sequence.named_parameters()) | {"x": x}
    output, final = sequence(x)
    rnn = sequence.rnns[0]
    truth, true_finals = ReferenceRNN.of(rnn, sliced=5)(dict(rnn.named_parameters()), x)
    parts = {
        "slices": lambda output, finals: [output[..., :5]],
        "final state": lambda output, finals: finals,
        "nothing but one step": lambda output, finals: [output[4, :, :5]],
    }[use]
    found = gradients(weighted_sum(parts(output, as_parts(final))), named)
    assert_close(found, gradients(weighted_sum(parts(truth, true_finals)), named), 1e-9)


# --- what must not pass silently -----------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [9, 2, 4]])
@pytest.mark.parametrize("units", [3, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_slices_that_were_changed_in_place_are_noticed(cell, units, lengths):
    sequence = sliced(cell, units, 3, 8)
    x = normal(9, 3, 3)
    output, final = sequence(x if lengths is None else packed(x, lengths))
    with torch.no_grad():
        (output if lengths is None else output.data).mul_(2)
    with pytest.raises(ReversalError, match=r"change in place.*Call backward\(\) before"):
        as_parts(final)[0].sum().backward()


@pytest.mark.parametrize("units", [3, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_were_changed_are_noticed(cell, units):
    for change in ("data", "no_grad"):
        sequence = sliced(cell, units, 3, 8)
        output, _ = sequence(normal(9, 3, 3))
        weight = sequence.rnns[0].weight_hh_l0
        with torch.no_grad():
            (weight.data if change == "data" else weight).add_(0.1)
        with pytest.raises(ReversalError, match="changed in place"):
            output.sum().backward()


@pytest.mark.parametrize("units", [-1, 2.0, None, True])
def test_units_must_be_a_whole_number(units):
    with pytest.raises(ValueError, match=r"units must be a whole number, 0 or more, got"):
        HiddenSlice(units)


def test_a_slice_may_not_be_wider_than_the_layer():
    with pytest.raises(ValueError, match=r"slice of 9 units, but the rnn has 8.*HiddenSlice\(8\)"):
        sliced(RevGRU, 9, 3, 8)


def test_segments_do_not_go_with_a_slice():
    with pytest.raises(ValueError, match=r"segment_steps=4 does not go.*Use segment_steps=None"):
        ReversibleSequence(nn.Identity(), RevGRU(3, 8), HiddenSlice(2), segment_steps=4)


class SquashedSlice(HiddenSlice):
    def forward(self, hidden):
        return super().forward(hidden).tanh()


@pytest.mark.parametrize("cell", CELLS)
def test_a_module_derived_from_a_slice_does_what_it_says(cell):
    sequence = sliced(cell, 3, 3, 8, dtype=torch.float64)
    sequence.read_out = SquashedSlice(3)
    x = normal(9, 3, 3, dtype=torch.float64)
    truth = sequence.read_out(sequence.rnns[0](x)[0])
    torch.testing.assert_close(sequence(x)[0], truth, rtol=1e-12, atol=1e-12)


def test_a_slice_outside_a_sequence_is_a_copy():
    hidden = normal(5, 3, 8)
    part = HiddenSlice(3)(hidden)
    assert torch.equal(part, hidden[..., :3])
    assert part.untyped_storage().nbytes() == 4 * 5 * 3 * 3
    assert str(HiddenSlice(3)) == "HiddenSlice(3)"
