"""With perturbed recurrent weights the backward pass recovers the initial state bit for bit."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible.kernels import torch_only
from tests.helpers.passes import (
    CELLS,
    call,
    initial_states,
    normal,
    recovered_states,
    weighted_sum,
)
from tests.helpers.perturbed_layers import DELTA, perturbed
from tests.helpers.properties import examples
from tests.helpers.reference_cell import ReferenceRNN


def assert_recovers(rnn, x, states, lengths, autocast=False):
    """Runs both passes and compares what the second arrives at with the given states."""
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output, finals = call(rnn, packed, states)
    with recovered_states() as found:
        weighted_sum([output.data, *finals]).backward()
    assert len(found) == len(rnn.last_passes)
    scale = ReferenceRNN.of(rnn).scale
    for layer, recovered in enumerate(found):
        assert recovered.empty
        for state, given_state in zip(recovered.states, states, strict=True):
            truth = given_state[layer][packed.sorted_indices].detach().double()
            assert torch.equal(state, (truth * scale).round() / scale)
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())


@st.composite
def passes(draw):
    steps = draw(st.integers(1, 40))
    return {
        "cell": draw(st.sampled_from(CELLS)),
        "features": draw(st.integers(1, 4)),
        "lengths": draw(st.lists(st.integers(1, steps), min_size=1, max_size=4)),
        "precision": draw(st.sampled_from(["float32", "float64", "bfloat16"])),
        "scale": draw(st.sampled_from([0.1, 1.0, 30.0])),
        "delta": draw(st.sampled_from([0.0, 0.3, 10.0])),
        "hidden_size": 2 * draw(st.integers(1, 5)),
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "max_forget_bits": draw(st.sampled_from([1, 3, 0.37, None, 0])),
        "chunk_steps": draw(st.none() | st.integers(1, 50)),
        "seed": draw(st.integers(0, 1000)),
        "torch_only": draw(st.booleans()),
    }


@given(passes())
@examples(max_examples=60)
def test_backward_recovers_the_initial_state_bit_for_bit(case):
    dtype = torch.float64 if case["precision"] == "float64" else torch.float32
    names = ("hidden_size", "num_layers", "bidirectional", "max_forget_bits", "chunk_steps")
    options = {name: case[name] for name in names}
    rnn = perturbed(case["cell"], case["features"], seed=case["seed"], dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if name.startswith(DELTA):
                parameter.mul_(case["delta"])
    shape = (max(case["lengths"]), len(case["lengths"]), case["features"])
    x = case["scale"] * normal(*shape, seed=case["seed"], dtype=dtype)
    states = initial_states(rnn, shape[1], 2 * case["scale"])
    with torch_only() if case["torch_only"] else nullcontext():
        assert_recovers(rnn, x, states, case["lengths"], autocast=case["precision"] == "bfloat16")


@pytest.mark.parametrize("bits", [1, None])
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps_of_ragged_sequences_are_recovered(cell, bits):
    rnn = perturbed(cell, 5, 12, max_forget_bits=bits)
    assert_recovers(rnn, normal(1000, 3, 5), initial_states(rnn, 3), [1000, 1, 737])


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_wide_layers_are_recovered_with_either_matrix_library(cell, enabled):
    rnn = perturbed(cell, 37, 74)
    with torch.backends.mkldnn.flags(enabled=enabled):
        assert_recovers(rnn, normal(70, 13, 37), initial_states(rnn, 13), [70] * 12 + [31])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["native", "native autocast", "torch"])
@pytest.mark.parametrize("bits", [1, 3, None, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps_of_a_wide_layer_are_recovered(cell, bits, mode):
    rnn = perturbed(cell, 200, 300, max_forget_bits=bits)
    x, states = normal(1000, 20, 200), initial_states(rnn, 20)
    with torch_only() if mode == "torch" else nullcontext():
        assert_recovers(rnn, x, states, [1000] * 20, autocast="autocast" in mode)
