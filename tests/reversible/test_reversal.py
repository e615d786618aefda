"""The backward pass recovers the initial state bit for bit, or says that it could not."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import ReversalError
from lightning_revflip.reversible.kernels import torch_only
from tests.helpers.passes import (
    CELLS,
    call,
    initial_states,
    make,
    normal,
    recovered_states,
    weighted_sum,
)
from tests.helpers.properties import examples
from tests.helpers.reference_cell import ReferenceRNN

BITS = [1, 2, 3, 5, 0.37, None, 0]


def assert_recovers(rnn, x, states=(), lengths=None, autocast=False):
    """Runs both passes and compares what the second arrives at with the given states."""
    order = list(range(x.shape[1]))
    inputs = x
    if lengths is not None:
        inputs = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        order = inputs.sorted_indices.tolist()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output, finals = call(rnn, inputs, states)
    data = output if lengths is None else output.data
    with recovered_states() as found:
        weighted_sum([data, *finals]).backward()

    directions = 2 if rnn.bidirectional else 1
    assert len(found) == rnn.num_layers * directions
    scale = ReferenceRNN.of(rnn).scale
    for layer, recovered in enumerate(found):
        assert recovered.empty
        for i, state in enumerate(recovered.states):
            truth = torch.zeros_like(state)
            if states:
                given = states[i][layer][order].detach().double()
                truth = (given * scale).round() / scale
            assert torch.equal(state, truth)
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())


@st.composite
def passes(draw):
    """Everything that a user can choose."""
    batch = draw(st.integers(0, 4))
    steps = draw(st.integers(1, 40))
    lengths = None
    if batch and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    precision = draw(st.sampled_from(["float32", "float64", "bfloat16"]))
    return {
        "cell": draw(st.sampled_from(CELLS)),
        "features": draw(st.integers(1, 5)),
        "batch": batch,
        "steps": steps,
        "lengths": lengths,
        "precision": precision,
        "states": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.1, 1.0, 30.0])),
        "hidden_size": 2 * draw(st.integers(1, 5)),
        "num_layers": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "max_forget_bits": draw(st.sampled_from(BITS) | st.floats(0.01, 12)),
        "chunk_steps": draw(st.none() | st.integers(1, 50)),
        "seed": draw(st.integers(0, 1000)),
        "torch_only": draw(st.booleans()),
    }


@given(passes())
@examples(max_examples=120)
def test_backward_recovers_the_initial_state_bit_for_bit(case):
    dtype = torch.float64 if case["precision"] == "float64" else torch.float32
    names = ("hidden_size", "num_layers", "bias", "bidirectional", "max_forget_bits", "chunk_steps")
    options = {name: case[name] for name in names}
    rnn = make(case["cell"], case["features"], seed=case["seed"], dtype=dtype, **options)
    shape = (case["steps"], case["batch"], case["features"])
    x = case["scale"] * normal(*shape, seed=case["seed"], dtype=dtype)
    states = initial_states(rnn, case["batch"], 2 * case["scale"]) if case["states"] else ()
    with torch_only() if case["torch_only"] else nullcontext():
        assert_recovers(rnn, x, states, case["lengths"], autocast=case["precision"] == "bfloat16")


@given(
    cell=st.sampled_from(CELLS),
    bits=st.sampled_from(BITS),
    steps=st.integers(41, 1000),
    chunk_steps=st.none() | st.integers(1, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@examples(max_examples=15)
def test_long_sequences_are_recovered(cell, bits, steps, chunk_steps, dtype, seed):
    rnn = make(cell, 3, 8, max_forget_bits=bits, chunk_steps=chunk_steps, dtype=dtype, seed=seed)
    lengths = [steps, max(1, steps // 3)]
    assert_recovers(rnn, normal(steps, 2, 3, seed=seed, dtype=dtype), (), lengths)


@pytest.mark.parametrize("bits", [1, None])
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps_of_ragged_sequences_are_recovered(cell, bits):
    rnn = make(cell, 5, 12, bidirectional=True, max_forget_bits=bits)
    assert_recovers(rnn, normal(1000, 4, 5), initial_states(rnn, 4), [1000, 1, 999, 137])


@pytest.mark.parametrize("cell", CELLS)
def test_wide_layers_are_recovered_with_either_matrix_library(cell):
    for enabled in (True, False):
        rnn = make(cell, 37, 74, 2)
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert_recovers(rnn, normal(70, 13, 37))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["native", "native autocast", "torch"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, None, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps_of_a_wide_layer_are_recovered(cell, bits, mode):
    rnn = make(cell, 200, 300, max_forget_bits=bits)
    with torch_only() if mode == "torch" else nullcontext():
        assert_recovers(
            rnn, normal(1000, 20, 200), initial_states(rnn, 20), autocast="autocast" in mode
        )


@pytest.mark.parametrize("bits", [3, None])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_saturate_every_gate_are_recovered(cell, bits):
    rnn = make(cell, 3, 8, max_forget_bits=bits)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.mul_(300)
    assert_recovers(rnn, normal(200, 4, 3), initial_states(rnn, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_of_any_memory_layout_are_recovered(cell):
    rnn = make(cell, 37, 74)
    unaligned = normal(30 * 4 * 37 + 1)[1:].view(30, 4, 37)
    transposed = normal(37, 4, 30).permute(2, 1, 0)
    repeated = normal(1, 4, 37).expand(30, 4, 37)
    for x in (unaligned, transposed, repeated):
        assert_recovers(rnn, x)


@pytest.mark.parametrize("cell", CELLS)
def test_saved_tensors_may_be_moved_between_the_passes(cell):
    rnn = make(cell, 37, 74)
    x = normal(30 * 4 * 37 + 1)[1:].view(30, 4, 37)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        output, _ = call(rnn, x)
    with recovered_states() as found:
        output.sum().backward()
    assert len(found) == 1


# --- what must not pass silently -----------------------------------------------------------------


def corrupted_pass(cell, corrupt, bits=3):
    """A backward pass before which `corrupt(rnn, x, states)` changed something."""
    rnn = make(cell, 5, 8, max_forget_bits=bits)
    x, states = normal(40, 3, 5), initial_states(rnn, 3)
    output, _ = call(rnn, x, states)
    corrupt(rnn, x, states)
    output.sum().backward()


def add_in_place(name):
    def corrupt(rnn, x, states):
        with torch.no_grad():
            getattr(rnn, name).add_(0.01)

    return corrupt


def change_one_element(name):
    def corrupt(rnn, x, states):
        getattr(rnn, name).data[0, 0] += 0.1

    return corrupt


def optimizer_step(rnn, x, states):
    for parameter in rnn.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(rnn.parameters(), lr=0.01).step()


def change_input(rnn, x, states):
    x.data[7, 1, 2] += 0.1


def change_first_input(rnn, x, states):
    x.data[0, 0] += 0.5


def change_initial_state(rnn, x, states):
    states[0].data[0, 0, 0] += 0.1


def lose_weights(rnn, x, states):
    rnn.weight_hh_l0.data.fill_(float("nan"))


CORRUPTIONS = {
    "recurrent weight in place": add_in_place("weight_hh_l0"),
    "input weight in place": add_in_place("weight_ih_l0"),
    "element of a recurrent weight": change_one_element("weight_hh_l0"),
    "element of an input weight": change_one_element("weight_ih_l0"),
    "optimizer step": optimizer_step,
    "element of the input": change_input,
    "first input": change_first_input,
    "initial state": change_initial_state,
    "weights lost": lose_weights,
}


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_change_between_the_passes_is_named_with_its_likely_causes(cell, name):
    message = (
        r"did not restore its initial state: .+ Its gradients would be wrong\. "
        r"Likely causes: a weight, a bias, the input or the initial state was changed in place "
        r"between forward and backward .* Call backward\(\) before you change anything"
    )
    with pytest.raises(ReversalError, match=message):
        corrupted_pass(cell, CORRUPTIONS[name])


@pytest.mark.parametrize("bits", [0, None])
@pytest.mark.parametrize("cell", CELLS)
def test_a_changed_weight_is_noticed_without_and_with_unlimited_forgetting(cell, bits):
    with pytest.raises(ReversalError):
        corrupted_pass(cell, change_one_element("weight_hh_l0"), bits)


@pytest.mark.parametrize("cell", CELLS)
def test_a_change_that_moves_gates_by_one_unit_is_noticed(cell):
    rnn = make(cell, 1, 2, dtype=torch.float64)
    x = torch.ones(40, 1, 1, dtype=torch.float64)
    output, _ = call(rnn, x)
    x.data[20] += 2e-3
    with pytest.raises(ReversalError):
        output.sum().backward()
