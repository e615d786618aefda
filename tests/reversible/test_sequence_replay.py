"""Random numbers inside a ReversibleSequence come out the same when a chunk is run again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import (
    LockedDropout,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
)
from tests.helpers.passes import (
    assert_close,
)
from tests.helpers.sequences import (
    DOUBLE,
    HIDDEN,
    VOCABULARY,
    Loss,
    Plain,
    loss_and_gradients,
    tokens,
)


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
