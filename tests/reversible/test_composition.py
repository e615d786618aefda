"""A layer is the sum of its parts: chunks, sequences, directions, layers, calls, passes."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from lightning_revflip.reversible import memory_report
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

SUFFIXES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def double(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float64).requires_grad_()


def parameters(rnn):
    return dict(rnn.named_parameters())


def copy_parameters(source, target, source_suffix, target_suffix="l0"):
    with torch.no_grad():
        for name in SUFFIXES:
            weight = getattr(source, f"{name}_{source_suffix}")
            getattr(target, f"{name}_{target_suffix}").copy_(weight)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_chunk_steps_change_neither_outputs_nor_gradients(cell, bidirectional):
    x = double(23, 3, 4)
    lengths = torch.tensor([23, 20, 5])
    results = []
    for chunk_steps in (None, 1, 2, 7, 23, 100):
        rnn = make(
            cell, 4, 6, 2, bidirectional=bidirectional, chunk_steps=chunk_steps, dtype=torch.float64
        )
        output, finals = call(rnn, pack_padded_sequence(x, lengths))
        loss = weighted_sum([output.data, *finals])
        results.append((output.data, gradients(loss, {**parameters(rnn), "x": x})))
    (first_output, first), *others = results
    for output, found in others:
        assert torch.equal(output, first_output)
        assert_close(found, first, 1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_packed_batch_is_its_sequences_run_alone(cell, bidirectional):
    rnn = make(cell, 4, 6, 2, bidirectional=bidirectional, dtype=torch.float64)
    sequences = [double(steps, 4, seed=steps) for steps in (5, 19, 1, 11)]
    named = {**parameters(rnn), **{f"x{i}": x for i, x in enumerate(sequences)}}
    output, finals = call(rnn, pack_sequence(sequences, enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)

    total = 0.0
    for i, x in enumerate(sequences):
        alone, alone_finals = call(rnn, x)
        assert torch.equal(padded[: len(x), i], alone)
        assert all(torch.equal(a[:, i], b) for a, b in zip(finals, alone_finals, strict=True))
        total = total + weighted_sum([alone, *alone_finals], seed=10 * i)
    together = sum(
        weighted_sum([padded[: len(x), i], *(state[:, i] for state in finals)], seed=10 * i)
        for i, x in enumerate(sequences)
    )
    assert_close(gradients(together, named), gradients(total, named), 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_can_hold_anything(cell):
    rnn = make(cell, 4, 6, bidirectional=True, dtype=torch.float64)
    lengths = torch.tensor([3, 9, 6])
    x = normal(9, 3, 4, dtype=torch.float64)
    other = x.clone()
    for i, length in enumerate(lengths):
        other[length:, i] = float("nan")
    results = []
    for values in (x.requires_grad_(), other.requires_grad_()):
        output, finals = call(rnn, pack_padded_sequence(values, lengths, enforce_sorted=False))
        loss = weighted_sum([output.data, *finals])
        results.append(gradients(loss, {**parameters(rnn), "x": values}))
    assert_close(results[1], results[0], 0.0)
    assert results[0]["x"][3:, 0].abs().max() == 0


@pytest.mark.parametrize("cell", CELLS)
def test_two_directions_are_two_layers_one_on_the_flipped_input(cell):
    both = make(cell, 4, 6, bidirectional=True, dtype=torch.float64)
    ahead, back = (make(cell, 4, 6, dtype=torch.float64) for _ in range(2))
    copy_parameters(both, ahead, "l0")
    copy_parameters(both, back, "l0_reverse")
    x = double(15, 3, 4)
    states = initial_states(both, 3)
    output, finals = call(both, x, states)
    found = gradients(weighted_sum([output, *finals]), {**parameters(both), "x": x})

    first, first_finals = call(ahead, x, [state[:1] for state in states])
    second, second_finals = call(back, x.flip(0), [state[1:] for state in states])
    truth = torch.cat([first, second.flip(0)], dim=2)
    true_finals = [torch.cat(pair) for pair in zip(first_finals, second_finals, strict=True)]
    assert torch.equal(output, truth)
    named = {"x": x}
    named |= parameters(ahead) | {f"{n}_reverse": p for n, p in parameters(back).items()}
    assert_close(found, gradients(weighted_sum([truth, *true_finals]), named), 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_a_stack_is_the_composition_of_its_layers(cell):
    stack = make(cell, 4, 6, 3, dtype=torch.float64)
    layers = [make(cell, 4 if n == 0 else 6, 6, dtype=torch.float64) for n in range(3)]
    for n, layer in enumerate(layers):
        copy_parameters(stack, layer, f"l{n}")
    x = double(15, 3, 4)
    states = initial_states(stack, 3)
    output, finals = call(stack, x, states)
    found = gradients(weighted_sum([output, *finals]), {**parameters(stack), "x": x})

    truth, true_finals, named = x, [], {"x": x}
    for n, layer in enumerate(layers):
        truth, final = call(layer, truth, [state[n : n + 1] for state in states])
        true_finals.append(final)
        named |= {name.replace("l0", f"l{n}"): p for name, p in layer.named_parameters()}
    true_finals = [torch.cat(parts) for parts in zip(*true_finals, strict=True)]
    assert torch.equal(output, truth)
    assert_close(found, gradients(weighted_sum([truth, *true_finals]), named), 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_two_pieces_is_one_sequence(cell):
    """Without forgetting: a buffer starts anew with each call, and lends its digits to a state."""
    rnn = make(cell, 4, 6, max_forget_bits=0, dtype=torch.float64)
    x = double(20, 3, 4)
    named = {**parameters(rnn), "x": x}
    whole, finals = call(rnn, x)
    first, middle = call(rnn, x[:8])
    second, last = call(rnn, x[8:], middle)
    pieces = torch.cat([first, second])
    assert torch.equal(whole, pieces)
    truth = gradients(weighted_sum([whole, *finals]), named)
    assert_close(gradients(weighted_sum([pieces, *last]), named), truth, 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_two_calls_before_backward_give_the_sum_of_their_gradients(cell):
    rnn = make(cell, 4, 6, 2, dtype=torch.float64)
    inputs = [double(9, 3, 4), double(12, 2, 4, seed=1)]
    separate = [gradients(weighted_sum([call(rnn, x)[0]]), parameters(rnn)) for x in inputs]
    outputs = [call(rnn, x)[0] for x in inputs]
    loss = weighted_sum(outputs[:1]) + weighted_sum(outputs[1:])
    truth = {name: separate[0][name] + separate[1][name] for name in separate[0]}
    assert_close(gradients(loss, parameters(rnn)), truth, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_a_retained_graph_gives_the_same_gradients_again(cell):
    rnn = make(cell, 4, 6, 2)
    output, _ = call(rnn, normal(30, 3, 4))
    loss = weighted_sum([output])
    first = gradients(loss, parameters(rnn), retain_graph=True)
    assert_close(gradients(loss, parameters(rnn)), first, 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_the_same_under_activation_checkpointing(cell, reentrant):
    rnn = make(cell, 4, 6, 2)
    x = normal(30, 3, 4).requires_grad_()

    def run(x):
        return call(rnn, x)[0]

    weighted_sum([run(x)]).backward()
    truth = {name: p.grad.clone() for name, p in {**parameters(rnn), "x": x}.items()}
    rnn.zero_grad()
    x.grad = None
    weighted_sum([checkpoint(run, x, use_reentrant=reentrant)]).backward()
    found = {name: p.grad for name, p in {**parameters(rnn), "x": x}.items()}
    assert_close(found, truth, 0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bits", [3, None, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_a_pass_without_gradients_has_the_same_bits_and_stores_nothing(cell, bits, mode):
    rnn = make(cell, 4, 6, 2, bidirectional=True, max_forget_bits=bits)
    x = normal(30, 3, 4)
    truth, true_finals = call(rnn, x)
    rnn.eval()
    with mode():
        output, finals = call(rnn, x)
    assert torch.equal(output, truth)
    assert all(torch.equal(a, b) for a, b in zip(finals, true_finals, strict=True))
    report = memory_report(rnn)
    assert report.kept_bytes == report.stored_bits == 0
    assert output.grad_fn is None


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_stored_where_nothing_requires_gradients(cell):
    rnn = make(cell, 4, 6).requires_grad_(False)
    output, _ = call(rnn, normal(30, 3, 4))
    assert not output.requires_grad
    assert memory_report(rnn).kept_bytes == 0
