"""ReversibleSequence computes what its modules compute, and their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_revflip.reversible import (
    ReversibleSequence,
    RevGRU,
)
from tests.helpers.passes import (
    CELLS,
    assert_close,
    gradients,
    initial_states,
    normal,
    weighted_sum,
)
from tests.helpers.properties import examples
from tests.helpers.sequences import (
    DOUBLE,
    HIDDEN,
    VOCABULARY,
    Loss,
    Plain,
    as_parts,
    as_state,
    language_model,
    loss_and_gradients,
    tokens,
)


@examples(max_examples=40)
@given(
    cell=st.sampled_from(CELLS),
    bits=st.sampled_from([0, 1, 3, None]),
    num_layers=st.integers(1, 3),
    batch_first=st.booleans(),
    shape=st.tuples(st.integers(1, 13), st.integers(1, 3)),
    chunk_steps=st.integers(1, 15),
    read_out_steps=st.none() | st.integers(1, 15),
    mode=st.sampled_from([None, "forward", "backward"]),
    with_state=st.booleans(),
)
def test_loss_state_and_gradients_are_those_of_ordinary_autograd(
    cell,
    bits,
    num_layers,
    batch_first,
    shape,
    chunk_steps,
    read_out_steps,
    mode,
    with_state,
):
    sequence = language_model(
        cell,
        num_layers,
        batch_first=batch_first,
        max_forget_bits=bits,
        chunk_steps=chunk_steps,
        read_out_steps=read_out_steps,
        gradients=mode,
    )
    shape = shape[::-1] if batch_first else shape
    x, y = tokens(*shape), tokens(*shape, seed=1)
    states = initial_states(sequence.rnns[0], shape[int(not batch_first)]) if with_state else []
    named = dict(sequence.named_parameters()) | {f"state{i}": s for i, s in enumerate(states)}
    start = as_state(states) if states else None
    loss, state, found = loss_and_gradients(sequence, named, x, start, y)
    true_loss, true_state, truth = loss_and_gradients(Plain(sequence), named, x, start, y)
    torch.testing.assert_close(loss, true_loss, rtol=DOUBLE, atol=DOUBLE)
    for a, b in zip(as_parts(state), as_parts(true_state), strict=True):
        assert torch.equal(a, b)
    assert_close(found, truth, DOUBLE)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("segment_steps", [1, 4, 7, "auto"])
def test_segments_change_nothing_but_low_bits(cell, segment_steps):
    sequence = language_model(cell, 2, chunk_steps=3, segment_steps=segment_steps)
    named = dict(sequence.named_parameters())
    x, y = tokens(50, 2), tokens(50, 2, seed=1)
    loss, _, found = loss_and_gradients(sequence, named, x, None, y)
    sequence.segment_steps = None
    true_loss, _, truth = loss_and_gradients(sequence, named, x, None, y)
    # A fresh buffer rounds the states differently, by one unit of 2^-20 a step.
    torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=0)
    assert_close(found, truth, 1e-4)


class Outputs(nn.Linear):
    """Two kinds of outputs per step."""

    def forward(self, hidden, shift):
        return super().forward(hidden) + shift, hidden[..., :3].tanh()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_final_states_have_gradients(cell, batch_first):
    sequence = language_model(
        cell, 2, Outputs(HIDDEN, 5), batch_first=batch_first, chunk_steps=3, read_out_steps=2
    )
    x = tokens(2, 10) if batch_first else tokens(10, 2)
    shift = normal(*x.shape, 5, dtype=torch.float64).requires_grad_()
    states = initial_states(sequence.rnns[0], 2)
    named = dict(sequence.named_parameters()) | {"shift": shift}
    named |= {f"state{i}": s for i, s in enumerate(states)}
    found, truth = [], []
    for model, into in ((sequence, found), (Plain(sequence), truth)):
        outputs, state = model(x, as_state(states), shift)
        into += [*outputs, *as_parts(state)]
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=DOUBLE, atol=DOUBLE)
    results, true_results = (
        gradients(weighted_sum(part), named, retain_graph=True) for part in (found, truth)
    )
    assert_close(results, true_results, DOUBLE)
    only_state = [weighted_sum(part[-1:]) for part in (found, truth)]
    fewer = {n: p for n, p in named.items() if n.startswith("rnns")}
    assert_close(gradients(only_state[0], fewer), gradients(only_state[1], fewer), DOUBLE)


@pytest.mark.parametrize("cell", CELLS)
def test_final_state_has_a_gradient_when_gradients_are_computed_backward(cell):
    sequence = language_model(cell, gradients="backward", chunk_steps=4)
    named = dict(sequence.named_parameters())
    found, truth = (
        gradients(loss + weighted_sum(as_parts(state)), named)
        for loss, state in (
            model(tokens(9, 2), None, tokens(9, 2, seed=1)) for model in (sequence, Plain(sequence))
        )
    )
    assert_close(found, truth, DOUBLE)


def test_final_state_of_a_forward_differentiated_loss_has_no_gradient():
    _, (h, c) = language_model()(tokens(9, 2), None, tokens(9, 2))
    assert not h.requires_grad
    assert not c.requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_several_rnns_with_modules_between_them(cell):
    torch.manual_seed(0)
    between = [nn.Sequential(nn.Linear(10, 10), nn.Tanh()), nn.LayerNorm(6)]
    sequence = ReversibleSequence(
        nn.Embedding(VOCABULARY, 4),
        [cell(4, 10), cell(10, 6, num_layers=2), cell(6, 8)],
        Loss(8, VOCABULARY),
        between=between,
        chunk_steps=3,
    ).double()
    x, y = tokens(8, 2), tokens(8, 2, seed=1)
    named = dict(sequence.named_parameters())
    _, state, found = loss_and_gradients(sequence, named, x, None, y)
    _, true_state, truth = loss_and_gradients(Plain(sequence), named, x, None, y)
    assert_close(found, truth, DOUBLE)
    for a, b in zip(state, true_state, strict=True):
        assert all(map(torch.equal, as_parts(a), as_parts(b)))
    with torch.no_grad():
        again, true_again = (model(x, state, y)[0] for model in (sequence, Plain(sequence)))
    torch.testing.assert_close(again, true_again, rtol=DOUBLE, atol=0)


class Attention(nn.Module):
    """Attends to a memory that all steps share."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, 4)
        self.loss = Loss(4, VOCABULARY)

    def forward(self, hidden, target, *, memory, mask=None):
        scores = self.query(hidden) @ memory.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return self.loss(scores.softmax(-1) @ memory, target)


def test_shared_arguments_reach_every_chunk_and_get_their_gradient():
    sequence = language_model(read_out=Attention(), chunk_steps=2)
    memory = normal(5, 4, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([False, False, True, False, True])
    named = dict(sequence.named_parameters()) | {"memory": memory}
    args = (tokens(9, 2), None, tokens(9, 2, seed=1))
    kwargs = {"memory": memory, "mask": mask}
    _, _, found = loss_and_gradients(sequence, named, *args, **kwargs)
    _, _, truth = loss_and_gradients(Plain(sequence), named, *args, **kwargs)
    assert_close(found, truth, DOUBLE)


def test_inputs_and_weights_of_steps_get_their_gradient():
    torch.manual_seed(0)
    read_in = nn.Bilinear(3, 2, 6)
    sequence = ReversibleSequence(read_in, RevGRU(6, HIDDEN), Loss(HIDDEN, VOCABULARY)).double()
    sequence.chunk_steps = 3
    a, b, weight = (
        normal(7, 2, *size, seed=i, dtype=torch.float64).requires_grad_()
        for i, size in enumerate([(3,), (2,), ()])
    )
    named = dict(sequence.named_parameters()) | {"a": a, "b": b, "weight": weight}
    args = ((a, b), None, tokens(7, 2), weight)
    _, _, found = loss_and_gradients(sequence, named, *args)
    _, _, truth = loss_and_gradients(Plain(sequence), named, *args)
    assert_close(found, truth, DOUBLE)
    _, _, found = loss_and_gradients(sequence, named, (a.detach(), b), None, tokens(7, 2), None)
    _, _, truth = loss_and_gradients(
        Plain(sequence), named, (a.detach(), b), None, tokens(7, 2), None
    )
    assert_close(found, truth, DOUBLE)


class PackedPlain(nn.Module):
    """A sequence's modules on packed rows, by ordinary autograd."""

    def __init__(self, sequence) -> None:
        super().__init__()
        self.sequence = sequence

    def forward(self, inputs, state, target):
        rows = inputs._replace(data=self.sequence.read_in(inputs.data))
        hidden, final = self.sequence.rnns[0](rows, state)
        return self.sequence.read_out(hidden.data, target.data), final


@pytest.mark.parametrize("lengths", [[9, 6, 6, 1], [3, 9, 1, 9]])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences(cell, lengths):
    sequence = language_model(cell, 2, chunk_steps=4, read_out_steps=3)
    ordered = lengths == sorted(lengths, reverse=True)
    x, y = (
        pack_padded_sequence(tokens(9, 4, seed=i), torch.tensor(lengths), enforce_sorted=ordered)
        for i in (0, 1)
    )
    states = initial_states(sequence.rnns[0], 4)
    named = dict(sequence.named_parameters()) | {f"state{i}": s for i, s in enumerate(states)}
    loss, state, found = loss_and_gradients(sequence, named, x, as_state(states), y)
    true_loss, true_state, truth = loss_and_gradients(
        PackedPlain(sequence), named, x, as_state(states), y
    )
    torch.testing.assert_close(loss, true_loss, rtol=DOUBLE, atol=0)
    assert all(map(torch.equal, as_parts(state), as_parts(true_state)))
    assert_close(found, truth, DOUBLE)


def test_outputs_of_packed_sequences_are_packed():
    sequence = language_model(read_out=nn.Linear(HIDDEN, 3))
    x = pack_padded_sequence(tokens(5, 2), torch.tensor([3, 5]), enforce_sorted=False)
    outputs, _ = sequence(x)
    assert isinstance(outputs, PackedSequence)
    hidden, _ = sequence.rnns[0](x._replace(data=sequence.read_in(x.data)))
    torch.testing.assert_close(outputs.data, sequence.read_out(hidden.data))
    assert torch.equal(outputs.unsorted_indices, x.unsorted_indices)
