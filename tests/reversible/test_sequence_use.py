"""How a ReversibleSequence is used: over several calls and processes, precision, memory."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from benchmarks.measure import bytes_allocated
from lightning_revflip.reversible import (
    LinearCrossEntropy,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
    memory_report,
)
from tests.helpers.passes import (
    CELLS,
    assert_close,
    gradients,
    normal,
)
from tests.helpers.sequences import (
    DOUBLE,
    HIDDEN,
    VOCABULARY,
    Loss,
    Plain,
    as_parts,
    language_model,
    loss_and_gradients,
    tokens,
)


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
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 6)
        ),
    ],
)
def test_read_ins_with_matrix_products_come_out_the_same_again_in_float32(read_in, mode):
    torch.manual_seed(0)
    for batch in (1, 3, 20):
        x, y = normal(9, batch, 8), tokens(9, batch)
        for read_out, args in ((Loss(8, VOCABULARY), (x, None, y)), (nn.Linear(8, 3), (x,))):
            sequence = ReversibleSequence(
                read_in(), RevLSTM(6, 8), read_out, chunk_steps=4, gradients=mode
            )
            named = dict(sequence.named_parameters())
            found, truth = (
                gradients(model(*args)[0].sum(), named) for model in (sequence, Plain(sequence))
            )
            assert_close(found, truth, 1e-3)


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


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_weights_may_be_replaced_for_a_call(mode):
    sequence = language_model(chunk_steps=3, gradients=mode)
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
