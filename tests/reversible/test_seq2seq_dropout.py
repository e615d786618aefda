"""A source embedding that is looked up again is the one that the encoder's layer saw."""

from collections import defaultdict
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_revflip.reversible import LockedDropout
from tests.helpers.passes import assert_close, gradients
from tests.helpers.seq2seq import FEATURES, Plain, batch, translator
from tests.helpers.sequences import DOUBLE

DROPOUTS = {
    "nn.Dropout": lambda: nn.Dropout(0.5),
    "LockedDropout": lambda: LockedDropout(FEATURES, 0.5),
}


def dropped(kind, **kwargs):
    """A model with dropout of the source embedding, which has been called before."""
    model = translator(embedding_dropout=DROPOUTS[kind](), **kwargs)
    model(batch())  # modules are checked in the first call, on copies of some steps
    return model


def recorded(model):
    """Collects what the source embedding returns, by the first row of the chunk it is for."""
    calls = defaultdict(list)

    def record(module, args, output):
        calls[args[0].storage_offset()].append(output.detach().clone())

    model.encoder.sequence.read_in.register_forward_hook(record)
    return calls


def first_rows(calls):
    """What the first call returned for every chunk, joined: (rows, features)."""
    return torch.cat([calls[first][0] for first in sorted(calls)])


def padded(rows, data):
    """Rows of a packed source as (steps, batch, features)."""
    lengths = torch.tensor(data.source_lengths)
    packed = pack_padded_sequence(data.source, lengths, enforce_sorted=False)
    steps = len(data.source)
    return pad_packed_sequence(packed._replace(data=rows), total_length=steps)[0]


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_every_look_up_gives_the_same_numbers(kind, mode, precision):
    dtype = torch.float32 if precision == torch.bfloat16 else precision
    model = dropped(kind, dtype=dtype)
    model.decoder.sequence.gradients = mode
    calls = recorded(model)
    low = precision == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        model(batch())  # the self-check of a new kind of call may look steps up as well
        calls.clear()
        loss, _ = model(batch())
    loss.backward()
    assert len(calls) == 3, "7 steps in chunks of 3"
    for outputs in calls.values():
        # Encoder, 3 chunks of the decoder in 2 parts each, both perhaps once more, and back.
        assert len(outputs) >= 5
        assert all(torch.equal(output, outputs[0]) for output in outputs)
    zeros = (first_rows(calls) == 0).double().mean()
    assert 0.2 < zeros < 0.8, "dropout was active"


@pytest.mark.parametrize("kind", DROPOUTS)
def test_attention_is_given_what_the_layer_saw(kind):
    model, data = dropped(kind), batch([2, 7, 5, 3], [6, 5, 2, 1])
    calls, contexts = recorded(model), []
    model.decoder.read_out.attention.register_forward_pre_hook(
        lambda module, args: contexts.append(args[1].detach())
    )
    model(data)
    truth = padded(first_rows(calls), data).transpose(0, 1)
    for context in contexts:  # of the sentences that have not ended, the longest first
        for seen, embedded, length in zip(context, truth, data.source_lengths, strict=False):
            assert torch.equal(seen[:length, :FEATURES], embedded[:length])


class Masked(nn.Module):
    """An embedding times given numbers."""

    def __init__(self, embedding, factors):
        super().__init__()
        self.embedding = embedding
        self.factors = factors

    def forward(self, tokens):
        return self.embedding(tokens) * self.factors


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("context", ["slice:3", "embedding", "embedding+slice:3"])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_gradients_under_dropout_are_those_of_plain_autograd_with_the_same_mask(
    kind, context, mode
):
    model, data = dropped(kind, context=context), batch()
    model.decoder.sequence.gradients = mode
    calls = recorded(model)
    named = dict(model.named_parameters())
    loss, _ = model(data)
    found = gradients(loss, named)
    factors = 2.0 * (padded(first_rows(calls), data) != 0)
    masked = Masked(model.encoder.sequence.read_in[0], factors)
    with patch.object(model.encoder.sequence, "read_in", masked):
        true_loss, _ = Plain(model)(data)
    torch.testing.assert_close(loss, true_loss, rtol=DOUBLE, atol=0)
    assert_close(found, gradients(true_loss, named), DOUBLE)


@pytest.mark.parametrize("kind", DROPOUTS)
def test_looking_up_again_leaves_generators_and_dropout_of_the_decoder_alone(kind):
    states, masks = [], []
    for context in ("slice:3", "embedding+slice:3"):
        model = dropped(kind, context=context, dropout=nn.Dropout(0.5))
        zeros = []
        model.decoder.read_out.dropout.register_forward_hook(
            lambda module, args, output, zeros=zeros: zeros.append(output == 0)
        )
        torch.manual_seed(0)
        loss, _ = model(batch())
        loss.backward()
        states.append(torch.get_rng_state())
        masks.append(torch.cat(zeros))
    assert torch.equal(*states)
    assert torch.equal(*masks)
    assert 0.3 < masks[0].double().mean() < 0.7  # 112 draws: 4 standard deviations


def test_holding_the_context_in_memory_leaves_generators_alone():
    model, data = dropped("nn.Dropout"), batch()
    source, _ = model.encoder(data.source, data.source_lengths)
    before = torch.get_rng_state()
    first, second = source.in_memory(), source.in_memory()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.context, second.context)


def test_dropout_is_drawn_anew_in_every_call():
    model, data = dropped("nn.Dropout"), batch()
    first, second = (model.encoder(data.source, data.source_lengths)[0] for _ in range(2))
    assert not torch.equal(first.in_memory().context, second.in_memory().context)


@pytest.mark.parametrize("kind", DROPOUTS)
def test_evaluation_is_training_without_dropout(kind):
    evaluated = dropped(kind, dropout=nn.Dropout(0.5)).eval()
    with torch.no_grad():
        loss, _ = evaluated(batch())
    torch.testing.assert_close(loss, translator()(batch())[0].detach(), rtol=1e-12, atol=0)
