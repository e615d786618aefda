"""The reference is the paper's cell, and its smooth version has the gradient of its values."""

import math

import pytest
import torch

from tests.helpers.passes import CELLS, initial_states, make, normal
from tests.helpers.reference_cell import ReferenceRNN

BITS = (1, 2.5, None, 0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def assert_gradcheck(rnn, **kwargs):
    reference = ReferenceRNN.of(rnn, rounding=False)
    names, parameters = zip(*rnn.named_parameters(), strict=True)
    states = initial_states(rnn, batch=2)
    x = normal(3, 2, 1, dtype=torch.float64).requires_grad_()

    def run(x, *tensors):
        weights = dict(zip(names, tensors, strict=False))
        output, finals = reference(weights, x, tensors[len(names) :], lengths=[2, 3])
        return output, *finals

    assert torch.autograd.gradcheck(run, (x, *parameters, *states), atol=1e-7, **kwargs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_confirm_the_gradient_of_the_smooth_reference(cell, bits):
    assert_gradcheck(make(cell, 1, 2, max_forget_bits=bits, dtype=torch.float64))


@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_confirm_the_gradient_of_a_bidirectional_stack(cell):
    rnn = make(cell, 1, 4, 2, bidirectional=True, dtype=torch.float64)
    assert_gradcheck(rnn, fast_mode=True)


def gru_by_hand(w, x, h, floor):
    """Two units, one per half, one input; rows r, z, g of half 1, then of half 2."""
    for value in x:
        for i in (0, 1):
            r, z, g = (
                (w["ih"][3 * i + k], w["hh"][3 * i + k], w["b"][3 * i + k]) for k in range(3)
            )
            other = h[1 - i]
            reset = sigmoid(r[0] * value + r[1] * other + r[2])
            forget = floor + (1 - floor) * sigmoid(z[0] * value + z[1] * other + z[2])
            candidate = math.tanh(g[0] * value + g[1] * reset * other + g[2])
            h[i] = forget * h[i] + (1 - forget) * candidate
    return h


def lstm_by_hand(w, x, h, c, floor):
    """As `gru_by_hand`, rows z, p, f, o, g."""
    for value in x:
        for i in (0, 1):
            rows = [(w["ih"][5 * i + k], w["hh"][5 * i + k], w["b"][5 * i + k]) for k in range(5)]
            z, p, f, o, g = (a * value + u * h[1 - i] + b for a, u, b in rows)
            c[i] = (floor + (1 - floor) * sigmoid(z)) * c[i] + sigmoid(f) * math.tanh(g)
            h[i] = (floor + (1 - floor) * sigmoid(p)) * h[i] + sigmoid(o) * math.tanh(c[i])
    return h


@pytest.mark.parametrize("bits", [2, None])
@pytest.mark.parametrize("cell", CELLS)
def test_smooth_reference_evaluates_the_equations_of_the_paper(cell, bits):
    rnn = make(cell, 1, 2, max_forget_bits=bits, dtype=torch.float64)
    states = initial_states(rnn, batch=1)
    x = normal(4, 1, 1, dtype=torch.float64)
    weights = {
        "ih": rnn.weight_ih_l0.flatten().tolist(),
        "hh": rnn.weight_hh_l0.flatten().tolist(),
        "b": (rnn.bias_ih_l0 + rnn.bias_hh_l0).tolist(),
    }
    by_hand = gru_by_hand if len(states) == 1 else lstm_by_hand
    truth = by_hand(
        weights,
        x.flatten().tolist(),
        *(state.flatten().tolist() for state in states),
        0.0 if bits is None else 2.0**-bits,
    )

    _, finals = ReferenceRNN.of(rnn, rounding=False)(dict(rnn.named_parameters()), x, states)

    assert finals[0].flatten().tolist() == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cell", CELLS)
def test_rounding_moves_a_state_by_the_resolution_of_the_gates_at_most(cell, bits):
    rnn = make(cell, 3, 8, max_forget_bits=bits, dtype=torch.float64)
    x = normal(20, 4, 3, dtype=torch.float64)
    weights = dict(rnn.named_parameters())
    smooth, _ = ReferenceRNN.of(rnn, rounding=False)(weights, x)
    rounded, _ = ReferenceRNN.of(rnn)(weights, x)
    assert 0 < (rounded - smooth).abs().max() < (1e-4 if bits == 0 else 1e-2)


def test_an_ended_sequence_keeps_its_state_and_puts_out_zero():
    rnn = make(CELLS[0], 3, 4, dtype=torch.float64)
    x = normal(6, 2, 3, dtype=torch.float64)
    reference, weights = ReferenceRNN.of(rnn), dict(rnn.named_parameters())
    output, (h_n,) = reference(weights, x, lengths=[6, 2])
    alone, (alone_h_n,) = reference(weights, x[:2, 1:])
    assert output[2:, 1].abs().max() == 0
    assert torch.equal(output[:2, 1:], alone)
    assert torch.equal(h_n[:, 1:], alone_h_n)


def test_a_kept_unit_is_rounded_to_even_and_leaves_its_buffer_alone():
    reference = ReferenceRNN("RevLSTM", 8)
    integers = torch.tensor([[1.0, 3.0, -1.0, -3.0, 2047.0, 3.0]], dtype=torch.float64)
    half = torch.full_like(integers, 0.5)
    buffer = torch.full_like(integers, 2**15 + 1).long()
    product, after = reference._keep(integers / reference.scale, half, buffer, kept=5)
    assert (product * reference.scale).tolist() == [[0.0, 2.0, 0.0, -2.0, 1024.0, 1.0]]
    assert torch.equal(after[:, :5], buffer[:, :5])
    assert after[0, 5] != buffer[0, 5]


@pytest.mark.parametrize("sliced", [1, 4, 6, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_slicing_changes_low_bits_and_counts_fewer_gates(cell, sliced):
    rnn = make(cell, 3, 8, 2, dtype=torch.float64)
    x, weights = normal(20, 4, 3, dtype=torch.float64), dict(rnn.named_parameters())
    whole, some = ReferenceRNN.of(rnn), ReferenceRNN.of(rnn, sliced=sliced)
    truth, output = whole(weights, x)[0], some(weights, x)[0]
    assert 0 < (output - truth).abs().max() < 1e-3
    assert torch.equal(output[0], truth[0]), "there is nothing to round in a product with zero"
    fewer = sum(g.numel() for g in whole.forgotten) - sum(g.numel() for g in some.forgotten)
    assert fewer == 20 * 4 * sliced
