"""Wrong use of ReversibleSequence has clear errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import (
    LockedDropout,
    ReversalError,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
)
from tests.helpers.sequences import HIDDEN, VOCABULARY, Loss, language_model, tokens


def read_in(forward):
    """A module with this forward, on the embeddings of a small model."""

    class ReadIn(nn.Embedding):
        def forward(self, x):
            return forward(super().forward(x))

    return ReadIn(VOCABULARY, 6)


def read_out(forward):
    class ReadOut(nn.Module):
        def forward(self, *args, **kwargs):
            return forward(*args, **kwargs)

    return ReadOut()


@pytest.mark.parametrize(
    ("name", "mixing"),
    [
        ("a mean", lambda h: h.square().mean()),
        ("a difference of steps", lambda h: h - h.mean(0, keepdim=True)),
        ("positions", lambda h: h * torch.arange(len(h))[:, None, None]),
        ("a maximum", lambda h: h.logsumexp(0).sum()),
    ],
)
def test_read_out_that_mixes_time_steps(name, mixing):
    sequence = ReversibleSequence(nn.Identity(), RevGRU(2, 4), read_out(mixing))
    with pytest.raises(ValueError, match=r"read_out mixes time steps.*sum over steps"):
        sequence(torch.randn(8, 3, 2))


def test_read_in_and_modules_between_that_mix_time_steps():
    def smoothed(x):
        return x + x.roll(1, 0)

    sequence = ReversibleSequence(read_in(smoothed), RevGRU(6, HIDDEN), nn.Linear(HIDDEN, 2))
    with pytest.raises(ValueError, match="read_in mixes time steps"):
        sequence(tokens(8, 3))
    sequence = ReversibleSequence(
        nn.Identity(),
        [RevGRU(6, 6), RevGRU(6, 6)],
        nn.Identity(),
        between=[read_out(smoothed)],
    )
    with pytest.raises(ValueError, match=r"between\[0\] mixes time steps"):
        sequence(torch.randn(8, 3, 6))


def test_batch_statistics_mix_time_steps():
    norm = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Unflatten(0, (-1, 3)))
    sequence = ReversibleSequence(nn.Identity(), RevGRU(2, 4), norm)
    with pytest.raises(ValueError, match="BatchNorm"):
        sequence(torch.randn(8, 3, 2))
    norm.eval()
    sequence(torch.randn(8, 3, 2))


@pytest.mark.parametrize("how", ["numpy", "its own generator", "a counter"])
def test_read_in_that_cannot_be_replayed(how):
    numbers = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    count = [0.0]

    def noise(x):
        count[0] += 0.01
        if how == "numpy":
            return x + torch.from_numpy(numbers.standard_normal(x.shape)).float()
        if how == "a counter":
            return x + count[0]
        return x + torch.randn(x.shape, generator=generator)

    sequence = ReversibleSequence(read_in(noise), RevGRU(6, HIDDEN), Loss(HIDDEN, VOCABULARY))
    with pytest.raises(ValueError, match=r"read_in returns other numbers when it is called again"):
        sequence(tokens(8, 3), None, tokens(8, 3))


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_read_in_that_changes_after_the_check(mode):
    changing = [False]

    def noise(x):
        if changing[0]:
            return x + float(np.random.default_rng().normal())
        return x

    sequence = ReversibleSequence(
        read_in(noise), RevGRU(6, HIDDEN), Loss(HIDDEN, VOCABULARY), chunk_steps=3, gradients=mode
    )
    sequence(tokens(8, 3), None, tokens(8, 3))[0].backward()
    changing[0] = True
    with pytest.raises(ReversalError, match="read_in returned other numbers in the backward sweep"):
        sequence(tokens(8, 3), None, tokens(8, 3))[0].backward()


@pytest.mark.parametrize("segment_steps", [None, 4])
def test_weights_changed_before_backward(segment_steps):
    sequence = language_model(gradients="backward", chunk_steps=2, segment_steps=segment_steps)
    loss, _ = sequence(tokens(9, 2), None, tokens(9, 2))
    sequence.rnns[0].weight_hh_l0.data += 0.1
    with pytest.raises(ReversalError, match="changed in place") as error:
        loss.backward()
    assert "read_in" not in str(error.value)
    loss, _ = sequence(tokens(9, 2), None, tokens(9, 2))
    with torch.no_grad():
        sequence.read_in.weight.mul_(1.1)
    with pytest.raises(ReversalError, match="change in place"):
        loss.backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda h: h.detach().sum(),
        lambda h: torch.tensor(float(h.sum())),
        lambda h: h.argmax(-1).float().sum(),
    ],
)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_loss_without_gradient(loss, mode):
    sequence = ReversibleSequence(nn.Identity(), RevGRU(2, 4), read_out(loss), gradients=mode)
    with pytest.raises(ValueError, match="a loss without gradient"):
        sequence(torch.randn(5, 2, 2))[0].backward()
    with torch.no_grad():
        sequence(torch.randn(5, 2, 2))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((tokens(8, 3), None, tokens(7, 3)), r"per-step argument 0 must begin.*\(8, 3\).*\(7, 3\)"),
        ((tokens(8, 3), None, tokens(8, 2)), r"per-step argument 0 must begin.*\(8, 3\).*\(8, 2\)"),
        (((tokens(8, 3), tokens(8)),), r"inputs\[1\] must begin"),
        ((tokens(8), None, tokens(8)), r"inputs must be a tensor \(steps, batch, ...\)"),
        ((tokens(0, 3), None, tokens(0, 3)), "no time step or no sequence"),
        (([1, 2], None), "must be a tensor"),
        ((tokens(8, 3), None, 3), "per-step argument 0 must begin.*got int"),
        ((tokens(8, 3), torch.zeros(1, 3, HIDDEN), tokens(8, 3)), r"must be a tuple \(h, c\)"),
        (
            (tokens(8, 3), (torch.zeros(1, 2, HIDDEN),) * 2, tokens(8, 3)),
            r"h_0 must have shape.*\(1, 3, 8\).*\(1, 2, 8\)",
        ),
        (
            (tokens(8, 3), (torch.full((1, 3, HIDDEN), 1e9),) * 2, tokens(8, 3)),
            "h_0 must be finite and stay below",
        ),
    ],
)
def test_arguments_that_do_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        language_model().float()(*args)


def test_packed_arguments_must_agree():
    sequence = language_model()
    x = pack_padded_sequence(tokens(8, 3), torch.tensor([8, 5, 2]))
    with pytest.raises(ValueError, match=r"must be a PackedSequence of the same lengths"):
        sequence(x, None, tokens(8, 3))
    y = pack_padded_sequence(tokens(8, 3), torch.tensor([8, 6, 1]))
    with pytest.raises(ValueError, match=r"packed with the lengths of the inputs"):
        sequence(x, None, y)
    y = pack_padded_sequence(tokens(8, 3), torch.tensor([2, 5, 8]), enforce_sorted=False)
    with pytest.raises(ValueError, match="same order"):
        sequence(x, None, y)


def test_results_that_are_neither_a_loss_nor_outputs():
    for wrong in (lambda h: h[0], lambda h: h.sum(0), lambda h: "loss", lambda h: ()):
        sequence = ReversibleSequence(nn.Identity(), RevGRU(2, 4), read_out(wrong))
        with pytest.raises(ValueError, match="read_out must return a scalar loss, or outputs"):
            sequence(torch.randn(6, 3, 2))


def test_read_in_of_the_wrong_width():
    sequence = ReversibleSequence(nn.Embedding(VOCABULARY, 5), RevGRU(6, 4), nn.Identity())
    with pytest.raises(ValueError, match=r"read_in must return.*6\), got \(.*5\)"):
        sequence(tokens(4, 2))


def test_read_in_of_another_dtype():
    sequence = ReversibleSequence(nn.Identity(), RevGRU(6, 4), nn.Identity())
    with pytest.raises(ValueError, match=r"weights of torch.float32.*torch.float64"):
        sequence(torch.randn(4, 2, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rnn", "message"),
    [
        (nn.LSTM(4, 4), r"must be a RevGRU or RevLSTM, got LSTM.*from_standard"),
        (RevGRU(4, 4, bidirectional=True), "bidirectional rnn cannot run"),
        ([RevGRU(4, 4), RevLSTM(4, 4)], "of one kind"),
        ([RevGRU(4, 6), RevGRU(4, 4)], "6 units is followed by one that takes 4 features"),
        ([], "got none"),
    ],
)
def test_layers_that_cannot_run(rnn, message):
    with pytest.raises(ValueError, match=message):
        ReversibleSequence(nn.Identity(), rnn, nn.Identity())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_steps": 0}, "chunk_steps must be a positive integer or None, got 0"),
        ({"read_out_steps": -1}, "read_out_steps must be"),
        ({"segment_steps": "some"}, "segment_steps must be .*'some'"),
        ({"memory_budget": 1.5}, "memory_budget must be"),
        ({"gradients": "later"}, "gradients must be 'forward', 'backward' or None"),
        ({"between": [nn.Identity()]}, "one module less than there are rnns"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ReversibleSequence(nn.Identity(), RevGRU(4, 4), nn.Identity(), **options)


def test_sparse_gradients():
    sequence = ReversibleSequence(
        nn.Embedding(VOCABULARY, 6, sparse=True), RevGRU(6, 4), nn.Identity()
    )
    with pytest.raises(ValueError, match="sparse=False"):
        sequence(tokens(4, 2))


def test_divergence_is_reported():
    sequence = language_model()
    with torch.no_grad():
        sequence.rnns[0].weight_ih_l0[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"finite numbers, got NaN.*weight_ih of recurrent layer 0"
    ):
        sequence(tokens(4, 2), None, tokens(4, 2))


def test_backward_twice_and_double_backward():
    for options, message in (({}, "a second time"), ({"gradients": "backward"}, "a second time")):
        sequence = language_model(**options)
        loss, _ = sequence(tokens(4, 2), None, tokens(4, 2))
        loss.backward()
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
        loss, _ = sequence(tokens(4, 2), None, tokens(4, 2))
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, [sequence.read_in.weight], create_graph=True)


def test_read_out_whose_result_changes_its_kind():
    kinds = [True]
    sequence = ReversibleSequence(
        nn.Identity(), RevGRU(2, 4), read_out(lambda h: h.sum() if kinds[0] else h)
    )
    sequence(torch.randn(5, 2, 2))
    kinds[0] = False
    with pytest.raises(ValueError, match="a scalar loss when it was first called"):
        sequence(torch.randn(5, 2, 2))


def test_locked_dropout_of_wrong_inputs():
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1.0"):
        LockedDropout(4, 1.0)
    with pytest.raises(ValueError, match="got an input of 5 features"):
        LockedDropout(4)(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match="takes 3 dimensions"):
        LockedDropout(4)(torch.randn(2, 4))


def test_dropout_that_is_always_on_is_no_mistake():
    sequence = ReversibleSequence(nn.Identity(), RevGRU(2, 4), read_out(F.dropout))
    outputs, _ = sequence(torch.randn(5, 40, 2))
    assert 0.3 < (outputs == 0).float().mean() < 0.7  # 800 draws: 11 standard deviations


def test_modules_that_work_in_place():
    x = torch.randn(6, 3, 4)
    before = x.clone()
    for part in (nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True)):
        with pytest.raises(ValueError, match=r"read_in changes its input in place.*inplace=False"):
            ReversibleSequence(part, RevGRU(4, 4), nn.Identity())(x)
        assert torch.equal(x, before)
        with pytest.raises(ValueError, match="read_out changes its input in place"):
            ReversibleSequence(nn.Identity(), RevGRU(4, 4), part)(x)
    inside = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    ReversibleSequence(inside, RevGRU(4, 4), nn.Identity())(x)[0].sum().backward()


def test_tensors_that_a_module_uses_but_does_not_hold():
    embedding = nn.Embedding(VOCABULARY, 4)
    hidden_away = [embedding]
    tied = read_out(lambda h: h @ hidden_away[0].weight.t())
    sequence = ReversibleSequence(nn.Embedding(VOCABULARY, 4), RevGRU(4, 4), tied)
    with pytest.raises(ValueError, match=r"read_out uses a tensor of shape \(11, 4\).*Register it"):
        sequence(tokens(5, 2))
    # What another part holds is known.
    sequence = ReversibleSequence(embedding, RevGRU(4, 4), tied, chunk_steps=2).double()
    sequence(tokens(5, 2))[0].square().sum().backward()
    found, embedding.weight.grad = embedding.weight.grad, None
    tied(sequence.rnns[0](embedding(tokens(5, 2)))[0]).square().sum().backward()
    torch.testing.assert_close(found, embedding.weight.grad)


def test_mistakes_are_found_after_a_first_call_with_a_single_step():
    sequence = ReversibleSequence(nn.Identity(), RevGRU(2, 4), read_out(lambda h: h.mean()))
    sequence(torch.randn(1, 3, 2))
    with pytest.raises(ValueError, match="mixes time steps"):
        sequence(torch.randn(8, 3, 2))


def test_a_penalty_that_is_added_in_every_chunk_is_no_sum_over_steps():
    class Penalised(Loss):
        def forward(self, hidden, target):
            return super().forward(hidden, target) + 0.01 * self.weight.square().sum()

    sequence = language_model(read_out=Penalised(HIDDEN, VOCABULARY))
    with pytest.raises(ValueError, match="read_out mixes time steps"):
        sequence(tokens(8, 3), None, tokens(8, 3))


def test_arguments_of_a_sequence_must_be_modules():
    with pytest.raises(ValueError, match="read_out must be an nn.Module, got function"):
        ReversibleSequence(nn.Identity(), RevGRU(2, 4), lambda h: h)


def test_states_that_never_forget_may_not_outgrow_their_range():
    sequence = ReversibleSequence(nn.Identity(), RevLSTM(2, 4, max_forget_bits=0), nn.Identity())
    with pytest.raises(ValueError, match="the zero state must be finite and stay below 2048"):
        sequence(torch.zeros(2100, 1, 2))
