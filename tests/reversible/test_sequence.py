"""ReversibleSequence computes what its modules compute, and their gradients."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.measure import bytes_allocated
from lightning_revflip.reversible import (
    LinearCrossEntropy,
    LockedDropout,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
    memory_report,
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
from tests.helpers.sequences import HIDDEN, VOCABULARY, Loss, Plain, language_model, tokens

DOUBLE = 1e-9


def as_state(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)


def as_parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def loss_and_gradients(model, named, *args, **kwargs):
    """The loss and its gradients, as if it were multiplied by 3 (a scaler's factor)."""
    loss, state = model(*args, **kwargs)
    return loss, state, gradients(3.0 * loss, named)


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


# --- randomness ------------------------------------------------------------------------------


def noisy(**kwargs):
    """Every kind of dropout in every place."""
    torch.manual_seed(1)
    read_in = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Dropout(0.3), LockedDropout(6, 0.3))
    return ReversibleSequence(
        read_in,
        [RevLSTM(6, 10, num_layers=2, dropout=0.4), RevLSTM(10, HIDDEN)],
        DroppedLoss(HIDDEN, VOCABULARY),
        between=[nn.Sequential(LockedDropout(10, 0.3), nn.Dropout(0.2))],
        **kwargs,
    ).double()


class DroppedLoss(Loss):
    def forward(self, hidden, target):
        return super().forward(F.dropout(hidden, 0.3, self.training), target)


@pytest.mark.parametrize("options", [{}, {"gradients": "backward"}, {"segment_steps": 4}])
def test_gradients_under_dropout_agree_with_finite_differences(options):
    sequence = noisy(chunk_steps=2, read_out_steps=1, **options)
    x, y = tokens(7, 3), tokens(7, 3, seed=1)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)  # the same masks every time
        return sequence(x, None, y)[0]

    loss().backward()
    for parameter in sequence.parameters():
        # Along the gradient the slope is its norm, large against the rounding of the gates.
        direction = F.normalize(parameter.grad.flatten(), dim=0).view_as(parameter)
        step = 0.05
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss()
            parameter.sub_(2 * step * direction)
            below = loss()
            parameter.add_(step * direction)
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(slope, parameter.grad.norm(), rtol=0.05, atol=1e-3)


def test_dropout_is_drawn_anew_in_every_chunk_and_every_call():
    class Mask(nn.Module):
        def forward(self, hidden):
            return F.dropout(torch.ones_like(hidden))

    sequence = ReversibleSequence(
        nn.Identity(), RevGRU(2, 2), Mask(), chunk_steps=3, read_out_steps=3
    )
    x = torch.zeros(9, 40, 2)
    first, second = sequence(x)[0], sequence(x)[0]
    assert not torch.equal(first, second)
    assert len({tuple(chunk.flatten().tolist()) for chunk in first.split(3)}) == 3
    assert 0.4 < (first == 0).float().mean() < 0.6  # 720 draws: 5 standard deviations


def test_locked_dropout_is_that_of_the_plain_model_for_the_same_seed():
    torch.manual_seed(1)
    sequence = ReversibleSequence(
        nn.Sequential(nn.Embedding(VOCABULARY, 6), LockedDropout(6, 0.4)),
        [RevGRU(6, 10), RevGRU(10, HIDDEN)],
        Loss(HIDDEN, VOCABULARY),
        between=[LockedDropout(10, 0.3)],
        chunk_steps=2,
    ).double()
    named = dict(sequence.named_parameters())
    results = []
    for model in (sequence, Plain(sequence)):
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, named, tokens(7, 3), None, tokens(7, 3, seed=1)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=DOUBLE, atol=0)
    assert_close(results[0][2], results[1][2], DOUBLE)


def test_locked_dropout_of_packed_sequences_follows_the_sequence():
    sequence = ReversibleSequence(
        LockedDropout(30, 0.5), RevGRU(30, 4), nn.Identity(), chunk_steps=2
    )
    seen = []
    sequence.read_in.register_forward_hook(lambda *args: seen.append(args[2]))
    lengths = torch.tensor([5, 3, 2])
    x = pack_padded_sequence(torch.ones(5, 3, 30), lengths)
    sequence(x)
    rows = torch.cat(seen[-3:])  # the first calls were those of the self-check
    of_sequence = torch.cat([torch.arange(size) for size in x.batch_sizes.tolist()])
    for number in range(3):
        mine = rows[of_sequence == number]
        assert (mine == mine[0]).all()
        assert set(mine.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(rows[0], rows[1])


def test_generators_move_by_one_draw_whatever_happens_inside():
    states = []
    for sequence in (noisy(chunk_steps=1), noisy(chunk_steps=5, gradients="backward")):
        for part in sequence.modules():
            if isinstance(part, LockedDropout):
                part.p = 0.3
        torch.manual_seed(0)
        sequence(tokens(5, 2), None, tokens(5, 2))[0].backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- how it is used ---------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_back_propagation_carries_the_state(cell):
    sequence = language_model(cell, chunk_steps=3)
    x, y = tokens(12, 2), tokens(12, 2, seed=1)
    whole, end = sequence(x, None, y)
    first, state = sequence(x[:7], None, y[:7])
    second, final = sequence(x[7:], state, y[7:])
    torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=0)
    for a, b in zip(as_parts(final), as_parts(end), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    (first + second).backward()
    truth = copy.deepcopy(sequence)
    truth.zero_grad()
    plain, state = Plain(truth)(x[:7], None, y[:7])
    detached = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    (plain + Plain(truth)(x[7:], detached, y[7:])[0]).backward()
    assert_close(
        {n: p.grad for n, p in sequence.named_parameters()},
        {n: p.grad for n, p in truth.named_parameters()},
        DOUBLE,
    )


def test_gradients_accumulate_over_calls():
    sequence = language_model(chunk_steps=3)
    named = dict(sequence.named_parameters())
    batches = [(tokens(6, 2, seed=i), None, tokens(6, 2, seed=i + 9)) for i in range(3)]
    for batch in batches:
        sequence(*batch)[0].backward()
    truth = gradients(sum(Plain(sequence)(*batch)[0] for batch in batches), named)
    assert_close({n: p.grad for n, p in named.items()}, truth, DOUBLE)


def test_without_gradients_nothing_is_stored_and_the_loss_is_the_same():
    sequence = language_model()
    args = (tokens(20, 2), None, tokens(20, 2, seed=1))
    loss = sequence(*args)[0]
    assert memory_report(sequence).stored_bits > 0
    with torch.no_grad():
        torch.testing.assert_close(sequence(*args)[0], loss.detach(), rtol=1e-14, atol=0)
    assert memory_report(sequence).stored_bits == 0
    for parameter in sequence.parameters():
        parameter.requires_grad_(False)
    assert not sequence(*args)[0].requires_grad


def test_frozen_parts_get_no_gradient_and_the_others_theirs():
    sequence = language_model(num_layers=2, chunk_steps=3)
    sequence.read_in.requires_grad_(False)
    sequence.rnns[0].weight_hh_l0.requires_grad_(False)
    named = {n: p for n, p in sequence.named_parameters() if p.requires_grad}
    args = (tokens(7, 2), None, tokens(7, 2, seed=1))
    _, _, found = loss_and_gradients(sequence, named, *args)
    _, _, truth = loss_and_gradients(Plain(sequence), named, *args)
    assert_close(found, truth, DOUBLE)
    sequence(*args)[0].backward()
    assert sequence.read_in.weight.grad is None
    assert sequence.rnns[0].weight_hh_l0.grad is None


def test_tied_weights_have_one_gradient():
    head = LinearCrossEntropy(HIDDEN, VOCABULARY)
    sequence = ReversibleSequence(
        nn.Embedding(VOCABULARY, HIDDEN), RevGRU(HIDDEN, HIDDEN), head, chunk_steps=2
    ).double()
    head.weight = sequence.read_in.weight
    named = dict(sequence.named_parameters())
    assert "read_out.weight" not in named
    args = (tokens(7, 2), None, tokens(7, 2, seed=1))
    _, _, found = loss_and_gradients(sequence, named, *args)
    _, _, truth = loss_and_gradients(Plain(sequence), named, *args)
    assert_close(found, truth, DOUBLE)


class TiedLoss(nn.Module):
    """Holds the embedding that the read-in is."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden, target):
        logits = hidden @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")


def test_a_module_that_several_parts_hold_goes_on_learning():
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    sequence = ReversibleSequence(
        embedding, RevGRU(HIDDEN, HIDDEN), TiedLoss(embedding), chunk_steps=2
    ).double()
    weight, named = embedding.weight, dict(sequence.named_parameters())
    for _ in range(2):
        args = (tokens(7, 2), None, tokens(7, 2, seed=1))
        _, _, found = loss_and_gradients(sequence, named, *args)
        _, _, truth = loss_and_gradients(Plain(sequence), named, *args)
        assert_close(found, truth, DOUBLE)
        assert embedding.weight is weight


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize(
    "read_in",
    [
        lambda: nn.Linear(8, 6),
        lambda: nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 6)),
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 6)
        ),
    ],
)
def test_read_ins_with_matrix_products_come_out_the_same_again_in_float32(read_in, mode):
    torch.manual_seed(0)
    per_step = read_in()
    if isinstance(per_step, nn.Sequential) and len(per_step) == 2:
        per_step = nn.Sequential(PerStep(per_step[0]), per_step[1])
    for batch in (1, 3, 20):
        sequence = ReversibleSequence(
            per_step, RevLSTM(6, 8), Loss(8, VOCABULARY), chunk_steps=4, gradients=mode
        )
        x, y = normal(9, batch, 8), tokens(9, batch)
        sequence(x, None, y)[0].backward()
        sequence.read_out = nn.Linear(8, 3)
        sequence(x)[0].sum().backward()


class PerStep(nn.Module):
    """Attention among the sequences of a step, which mixes no steps."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_parameters_that_were_not_used_have_no_gradient():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = Loss(HIDDEN, VOCABULARY)
            self.unused = nn.Linear(HIDDEN, VOCABULARY)

        def forward(self, hidden, target):
            return self.used(hidden, target)

    for mode in ("forward", "backward"):
        sequence = language_model(read_out=Half(), gradients=mode)
        sequence(tokens(5, 2), None, tokens(5, 2))[0].backward()
        assert sequence.read_out.unused.weight.grad is None
        assert sequence.read_out.used.weight.grad is not None


def test_arguments_that_are_no_tensors_reach_the_read_out():
    class Scaled(Loss):
        def forward(self, hidden, target, *, scale, name):
            return super().forward(hidden, target) * scale if name else None

    sequence = language_model(read_out=Scaled(HIDDEN, VOCABULARY), chunk_steps=2)
    args = (tokens(5, 2), None, tokens(5, 2))
    one, three = (sequence(*args, scale=scale, name="loss")[0] for scale in (1.0, 3.0))
    torch.testing.assert_close(3 * one, three)


def test_weights_may_be_replaced_for_a_call():
    sequence = language_model(chunk_steps=3)
    args = (tokens(7, 2), None, tokens(7, 2, seed=1))
    dropped = {
        name: F.dropout(parameter, 0.5)
        for name, parameter in sequence.named_parameters()
        if "weight" in name
    }
    named = dict(sequence.named_parameters())
    found = gradients(functional_call(sequence, dropped, args)[0], named, retain_graph=True)
    plain = Plain(sequence)
    renamed = {f"sequence.{name}": weight for name, weight in dropped.items()}
    truth = gradients(functional_call(plain, renamed, args)[0], named)
    assert_close(found, truth, DOUBLE)


def test_results_beside_a_loss_are_summed_or_joined():
    class Counting(Loss):
        def forward(self, hidden, target):
            logits = F.linear(hidden, self.weight, self.bias)
            right = logits.argmax(-1) == target
            return super().forward(hidden, target), right.sum(), logits

    sequence = language_model(read_out=Counting(HIDDEN, VOCABULARY), chunk_steps=3)
    x, y = tokens(10, 4), tokens(10, 4, seed=1)
    (loss, right, logits), _ = sequence(x, None, y)
    (true_loss, true_right, true_logits), _ = Plain(sequence)(x, None, y)
    torch.testing.assert_close((loss, logits), (true_loss, true_logits), rtol=DOUBLE, atol=DOUBLE)
    assert right == true_right
    assert loss.requires_grad
    assert not logits.requires_grad


def test_is_copied_pickled_and_restored():
    sequence = language_model()
    args = (tokens(7, 2), None, tokens(7, 2, seed=1))
    loss = sequence(*args)[0]
    buffer = io.BytesIO()
    torch.save(sequence, buffer)
    buffer.seek(0)
    restored = [copy.deepcopy(sequence), torch.load(buffer, weights_only=False)]
    fresh = language_model()
    fresh.load_state_dict(sequence.state_dict())
    for other in (*restored, fresh):
        torch.testing.assert_close(other(*args)[0], loss, rtol=0, atol=0)


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_autocast_agrees_with_the_plain_model(cell):
    sequence = language_model(cell, chunk_steps=3).float()
    named = dict(sequence.named_parameters())
    args = (tokens(9, 4), None, tokens(9, 4, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = sequence(*args)
        true_loss, _ = Plain(sequence)(*args)
    assert loss.dtype == true_loss.dtype
    torch.testing.assert_close(loss, true_loss, rtol=2e-2, atol=0)
    assert_close(gradients(loss, named), gradients(true_loss, named), 0.05)


def test_nothing_underflows_in_float16_however_small_the_loss():
    class Small(Loss):
        def forward(self, hidden, target):
            return super().forward(hidden, target) * 1e-9

    sequence = language_model(read_out=Small(HIDDEN, VOCABULARY), chunk_steps=3).float()
    named = dict(sequence.named_parameters())
    args = (tokens(9, 4), None, tokens(9, 4, seed=1))
    truth = gradients(sequence(*args)[0] * 1e9, named)
    with torch.autocast("cpu", torch.float16):
        loss, _ = sequence(*args)
    found = gradients(loss * 1e9, named)  # what a GradScaler does
    assert_close(found, truth, 0.05)


# --- memory -----------------------------------------------------------------------------------


class Total(nn.Module):
    def forward(self, hidden):
        return hidden.sum()


def peak(steps, **options):
    """Bytes at the peak of a step beyond the gradients, and the report of the pass."""
    torch.manual_seed(0)
    sequence = ReversibleSequence(
        nn.Identity(), RevGRU(2, 64, max_forget_bits=3), Total(), chunk_steps=10, **options
    )
    x = normal(steps, 8, 2)

    def step() -> None:
        sequence(x)[0].backward()

    step()
    sequence.zero_grad()
    left, top = bytes_allocated(step)
    return top - left, memory_report(sequence)


def test_memory_grows_with_the_length_by_the_information_buffer_only():
    short, _ = peak(50)
    long, report = peak(600)
    # Words are packed before they are used: twice the buffer. And a checksum per chunk.
    assert long - short < 2.1 * report.stored_bits / 8 + 16 * 600 / 10


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_gates_are_counted_once_with_segments(mode):
    sequence = language_model(chunk_steps=3, segment_steps=6, gradients=mode)
    sequence(tokens(20, 2), None, tokens(20, 2))[0].backward()
    (layer,) = memory_report(sequence).layers
    assert layer.gate_counts.sum() == layer.unit_steps == 20 * 2 * 2 * HIDDEN


@pytest.mark.slow
def test_memory_with_segments_grows_with_the_square_root_of_the_length():
    short, _ = peak(50)
    for options, least, most in (({}, 3.0, 5.0), ({"segment_steps": "auto"}, 1.0, 2.8)):
        some, more = (peak(steps, **options)[0] - short for steps in (500, 2000))
        assert least < more / some < most


def test_chunk_steps_follow_the_memory_budget():
    sequence = language_model(RevGRU, memory_budget=100_000)
    per_step = 4 * (2 * 3 * HIDDEN + (6 + 2) * HIDDEN + 2 * 6)
    assert sequence.chosen_chunk_steps(5) == 100_000 // (5 * per_step)
    assert sequence.chosen_chunk_steps(10**9) == 1
    sequence.chunk_steps = 3
    assert sequence.chosen_chunk_steps(5) == 3
    sequence(tokens(8, 5), None, tokens(8, 5))
    assert memory_report(sequence).chunk_steps == 3


def test_two_processes_have_the_gradients_of_one(tmp_path):
    def start(rank: int, processes: int) -> subprocess.Popen[bytes]:
        command = ["-m", "tests.helpers.ddp_sequence", str(tmp_path), str(rank), str(processes)]
        return subprocess.Popen(
            [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    for process in [start(0, 2), start(1, 2), start(0, 1)]:
        assert process.wait(timeout=120) == 0
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert_close(two, one, DOUBLE)
