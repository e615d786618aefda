"""Misuse is answered by a message that says what is wrong, and bad numbers never pass silently."""

import pytest
import torch

from lightning_revflip.reversible import RevGRU, RevLSTM
from tests.helpers.passes import (
    CELLS,
    assert_close,
    call,
    gradients,
    initial_states,
    make,
    normal,
    recovered_states,
    weighted_sum,
)

# --- construction --------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"hidden_size": 301}, r"hidden_size must be .*even for Rev.* got 301\. Use 300 or 302"),
    ({"hidden_size": 0}, r"hidden_size must be positive .* got 0"),
    ({"input_size": 0}, r"input_size must be positive, got 0"),
    ({"num_layers": 0}, r"num_layers must be positive, got 0"),
    ({"max_forget_bits": -1}, r"max_forget_bits must be a number >= 0, or None .* got -1"),
    ({"max_forget_bits": float("nan")}, r"max_forget_bits must be .* got nan"),
    ({"dropout": 1.5}, r"dropout must be a probability in \[0, 1\], got 1.5"),
    ({"dropout": -0.1}, r"dropout must be a probability in \[0, 1\], got -0.1"),
    ({"dropout": float("nan")}, r"dropout must be a probability in \[0, 1\], got nan"),
    ({"chunk_steps": 0}, r"chunk_steps must be positive or None, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_bad_argument_is_named_with_its_value(cell, arguments, message):
    with pytest.raises(ValueError, match=message):
        cell(**{"input_size": 4, "hidden_size": 6, **arguments})


# --- calls ---------------------------------------------------------------------------------------

BAD_INPUTS = [
    (torch.zeros(5, 3, 7), r"expects inputs with 4 features .*input_size=4.* got 7"),
    (torch.zeros(5, 7), r"expects inputs with 4 features .* got 7"),
    (torch.zeros(4), r"expects a 3-dimensional input, .* got shape \(4,\)"),
    (torch.zeros(5, 3, 1, 4), r"expects a 3-dimensional input, .* got shape \(5, 3, 1, 4\)"),
    (torch.zeros(0, 3, 4), r"needs at least one time step, got none"),
    (torch.zeros(5, 3, 4).double(), r"weights of torch.float32, got an input of torch.float64"),
    (torch.zeros(5, 3, 4).long(), r"weights of torch.float32, got an input of torch.int64"),
]


@pytest.mark.parametrize(("x", "message"), BAD_INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_bad_input_is_described(cell, x, message):
    with pytest.raises(ValueError, match=f"{cell.__name__} .*{message}"):
        make(cell, 4, 6)(x)


BAD_SHAPES = [(1, 3, 6), (2, 2, 6), (2, 3, 5), (3, 6), (2, 1, 3, 6)]


@pytest.mark.parametrize("shape", BAD_SHAPES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("cell", CELLS)
def test_a_state_of_the_wrong_shape_is_named_with_the_right_one(cell, index, shape):
    rnn = make(cell, 4, 6, 2)
    states = initial_states(rnn, 3)
    index = min(index, len(states) - 1)
    states[index] = torch.zeros(shape)
    message = rf"{'hc'[index]}_0 must have shape .* = \(2, 3, 6\) .*, got \({shape[0]}, "
    with pytest.raises(ValueError, match=message):
        call(rnn, normal(5, 3, 4), states)


@pytest.mark.parametrize("cell", CELLS)
def test_a_state_without_batch_belongs_to_an_input_without_batch(cell):
    rnn = make(cell, 4, 6)
    with pytest.raises(
        ValueError, match=r"h_0 must have shape .*without batch dimension for a 2-D"
    ):
        call(rnn, normal(5, 4), [torch.zeros(1, 1, 6)] * (1 if cell is RevGRU else 2))


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["the input", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_numbers_that_are_not_finite_are_found_where_they_are(cell, name, value):
    rnn, x = make(cell, 4, 6), normal(5, 3, 4)
    if name == "the input":
        x[2, 1, 3] = value
    else:
        getattr(rnn, f"{name}_l0").data[3] = value
    found = "a bias" if name.startswith("bias") else name
    with pytest.raises(ValueError, match=rf"NaN or infinity in {found}.* clip gradients"):
        call(rnn, x)


@pytest.mark.parametrize("cell", CELLS)
def test_numbers_that_are_not_finite_are_found_in_the_last_step_and_without_gradients(cell):
    rnn, x = make(cell, 4, 6, 2, bidirectional=True, max_forget_bits=None), normal(50, 3, 4)
    x[-1, -1, -1] = float("nan")
    with torch.no_grad(), pytest.raises(ValueError, match="NaN or infinity in the input"):
        call(rnn, x)


@pytest.mark.parametrize("value", [*NOT_FINITE, 1e30])
@pytest.mark.parametrize(("cell", "limit"), [(RevGRU, 256), (RevLSTM, 2048)])
def test_an_initial_state_out_of_range_is_named_with_the_range(cell, limit, value):
    rnn = make(cell, 4, 6)
    for index in range(1 if cell is RevGRU else 2):
        for bad in (value, float(limit), -float(limit)):
            states = [state.detach() for state in initial_states(rnn, 3)]
            states[index][0, 2, 5] = bad
            message = rf"{'hc'[index]}_0 must be finite and stay below {limit} in magnitude"
            with pytest.raises(ValueError, match=message):
                call(rnn, normal(5, 3, 4), states)


# --- range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "largest"), [(RevGRU, 254.9), (RevLSTM, 2046.9)])
def test_the_largest_accepted_state_is_reversible(cell, largest):
    rnn = make(cell, 4, 6, max_forget_bits=None)
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(100.0)
    states = [torch.full_like(state, largest) for state in initial_states(rnn, 3)]
    output, _ = call(rnn, normal(30, 3, 4), states)
    output.sum().backward()
    assert output.abs().max() < largest + 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_saturated_gates_cannot_overflow_in_five_thousand_steps(sign):
    """Every step adds one to c and h and keeps 1023/1024 of them: the worst that can happen."""
    rnn = make(RevLSTM, 1, 2, max_forget_bits=None)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.bias_ih_l0.fill_(100.0)
        rnn.bias_ih_l0.view(2, 5)[:, 4] = 100.0 * sign
    output, (_, c_n) = rnn(torch.zeros(5000, 1, 1))
    bound = 1024 * (1 - (1023 / 1024) ** 5000)
    assert c_n.abs().max().item() == pytest.approx(bound, abs=0.1)
    assert output.abs().max().item() == pytest.approx(bound, abs=0.1)
    with recovered_states() as found:
        output.sum().backward()
    assert all(recovered.empty for recovered in found)
    assert all((state == 0).all() for state in found[0].states)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_never_forgets_is_refused_more_steps_than_it_can_hold(cell):
    rnn = make(cell, 1, 2, max_forget_bits=0)
    call(rnn, torch.zeros(2047, 1, 1))
    message = r"zero state .* stay below 2048 .* this pass can add up to 2048"
    with pytest.raises(ValueError, match=message):
        call(rnn, torch.zeros(2048, 1, 1))
    states = [torch.full((1, 1, 2), 2000.0)] * (1 if cell is RevGRU else 2)
    with pytest.raises(ValueError, match=r"h_0 .* magnitude of 2000, and this pass can add .* 48"):
        call(rnn, torch.zeros(48, 1, 1), states)


# --- backward ------------------------------------------------------------------------------------


LOSSES = {
    "linear": lambda output: output.sum(),
    "quadratic": lambda output: output.square().sum(),
}


@pytest.mark.parametrize("plus_loss", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_is_refused(cell, loss, plus_loss):
    rnn, x = make(cell, 4, 6), normal(5, 3, 4).requires_grad_()
    value = LOSSES[loss](call(rnn, x)[0])

    def penalise_gradient():
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        (grad.square().sum() + (value if plus_loss else 0)).backward()

    with pytest.raises(
        RuntimeError, match=r"differentiate twice|once_differentiable|double backward"
    ):
        penalise_gradient()


@pytest.mark.parametrize("cell", CELLS)
def test_a_second_backward_without_retain_graph_is_refused(cell):
    output, _ = call(make(cell, 4, 6), normal(5, 3, 4))
    loss = output.sum()
    loss.backward()
    with pytest.raises(
        RuntimeError, match=r"backward through the graph a second time.*retain_graph"
    ):
        loss.backward()


FORWARD_PRECISIONS = [None, torch.bfloat16]


@pytest.mark.parametrize("precision", FORWARD_PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_around_backward_changes_nothing(cell, precision):
    rnn, x = make(cell, 4, 6, 2, bidirectional=True), normal(30, 3, 4).requires_grad_()
    named = {**dict(rnn.named_parameters()), "x": x}

    def run(backward_precision):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            output, finals = call(rnn, x)
            loss = weighted_sum([output, *finals])
        enabled = backward_precision is not None
        with torch.autocast("cpu", backward_precision, enabled=enabled):
            return gradients(loss, named)

    truth = run(precision)
    for backward_precision in (None, torch.bfloat16, torch.float16):
        assert_close(run(backward_precision), truth, 0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_float64_is_not_lowered_by_autocast(cell):
    rnn, x = make(cell, 4, 6, dtype=torch.float64), normal(30, 3, 4).double()
    truth, _ = call(rnn, x)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = call(rnn, x)
    assert torch.equal(output, truth)


def test_an_initial_state_of_the_other_cell_is_refused() -> None:
    x, state = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="RevGRU takes one initial state h_0, got a tuple"):
        RevGRU(3, 4)(x, (state, state))
    with pytest.raises(ValueError, match=r"takes the initial state \(h_0, c_0\), got one tensor"):
        RevLSTM(3, 4)(x, state)
    with pytest.raises(ValueError, match=r"takes the initial state \(h_0, c_0\), got 1 tensors"):
        RevLSTM(3, 4)(x, (state,))


def test_an_initial_state_of_another_dtype_is_refused() -> None:
    for dtype in (torch.float64, torch.int64, torch.float16):
        with pytest.raises(ValueError, match=f"h_0 must have the dtype of the input.*got {dtype}"):
            RevGRU(3, 4)(torch.randn(5, 2, 3), torch.zeros(1, 2, 4, dtype=dtype))
