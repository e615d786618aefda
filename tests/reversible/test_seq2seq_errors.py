"""Wrong use of RevEncoder and RevDecoder says what was given and what to do."""

import pytest
import torch
from torch import nn

from lightning_revflip.reversible import (
    LinearCrossEntropy,
    LuongAttention,
    RevDecoder,
    RevEncoder,
    ReversalError,
    RevGRU,
    RevLSTM,
)
from tests.helpers.seq2seq import FEATURES, HIDDEN, SOURCE_WORDS, TARGET_WORDS, batch, translator


@pytest.mark.parametrize(
    "lengths",
    [
        [0, 2, 3, 4],
        [9, 2, 3, 4],
        [-1, 2, 3, 4],
        [2, 3, 4],
        [2, 3, 4, 5, 6],
        [[2, 3, 4, 5]],
        [2.5, 3.0, 4.0, 5.0],
        3,
        [],
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_that_do_not_fit(lengths, batch_first):
    model, data = translator(batch_first=batch_first), batch(batch_first=batch_first)
    message = (
        r"lengths must be 4 whole numbers from 1 to {}, one per sequence of tokens.*batch_first={}"
    )
    with pytest.raises(ValueError, match=message.format(8, batch_first)) as error:
        model.encoder(data.source, lengths)
    assert f"got {lengths}" in str(error.value)
    source, state = model.encoder(data.source, data.source_lengths)
    with pytest.raises(ValueError, match=message.format(7, batch_first)):
        model.decoder(data.tokens, data.targets, source, state, lengths)


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3), (0, 4), (4, 0)])
def test_tokens_that_are_no_batch(shape):
    with pytest.raises(ValueError, match=r"tokens must have shape|lengths must be"):
        translator().encoder(torch.zeros(shape, dtype=torch.long))


def test_a_target_for_every_source():
    model, data, other = translator(), batch(), batch([3, 2], [4, 1])
    source, _ = model.encoder(data.source, data.source_lengths)
    for given in (source, source.in_memory()):
        with pytest.raises(ValueError, match=r"source has 4 sequences, the target 2.*one target"):
            model.decoder(other.tokens, other.targets, given, None, other.target_lengths)


@pytest.mark.parametrize("lengths", [None, [3, 6, 1, 4]])
def test_a_target_for_every_token(lengths):
    """Also where lengths would cut both: targets that are not shifted would go unnoticed."""
    model, data = translator(), batch()
    source, state = model.encoder(data.source, data.source_lengths)
    for tokens, targets in ((data.tokens[:-1], data.targets), (data.tokens, data.targets[:, :3])):
        with pytest.raises(ValueError, match=r"targets must have the shape of tokens, \(.*got \("):
            model.decoder(tokens, targets, source, state, lengths)


def test_an_attention_of_another_context():
    model, data = translator(context="slice:3"), batch()
    other = translator(context="slice:6")
    source, state = other.encoder(data.source, data.source_lengths)
    for given in (source, source.in_memory()):
        with pytest.raises(
            ValueError,
            match=r"context of 6 features, the attention takes 3.*encoder\.context_size",
        ):
            model.decoder(data.tokens, data.targets, given, state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(1, 4, HIDDEN), r"must be a tuple \(h, c\)"),
        ((torch.zeros(1, 3, HIDDEN),) * 2, r"h_0 must have shape.*\(1, 4, 8\).*got \(1, 3, 8\)"),
        ((torch.zeros(1, 4, 6),) * 2, r"h_0 must have shape.*\(1, 4, 8\).*got \(1, 4, 6\)"),
        ((torch.zeros(2, 4, HIDDEN),) * 2, r"h_0 must have shape.*\(1, 4, 8\).*got \(2, 4, 8\)"),
    ],
)
def test_states_of_another_size(state, message):
    model, data = translator(dtype=torch.float32), batch()
    with pytest.raises(ValueError, match=message):
        model.encoder(data.source, data.source_lengths, state)
    source, _ = model.encoder(data.source, data.source_lengths)
    with pytest.raises(ValueError, match=message):
        model.decoder(data.tokens, data.targets, source, state, data.target_lengths)


@pytest.mark.parametrize(
    ("rnn", "message"),
    [
        (nn.LSTM(FEATURES, HIDDEN), r"must be a RevGRU or RevLSTM, got LSTM.*from_standard"),
        (RevGRU(FEATURES, HIDDEN, bidirectional=True), "bidirectional rnn cannot run"),
        ([RevLSTM(FEATURES, HIDDEN)], r"rnn must be a RevGRU or RevLSTM, got list"),
        (None, r"rnn must be a RevGRU or RevLSTM, got NoneType"),
    ],
)
def test_layers_that_cannot_run(rnn, message):
    with pytest.raises(ValueError, match=message):
        RevEncoder(nn.Embedding(SOURCE_WORDS, FEATURES), rnn)
    with pytest.raises(ValueError, match=message):
        RevDecoder(
            nn.Embedding(TARGET_WORDS, FEATURES),
            rnn,
            LuongAttention(HIDDEN, HIDDEN),
            LinearCrossEntropy(HIDDEN, TARGET_WORDS),
        )


@pytest.mark.parametrize("context", ["everything", "slice:0", None])
def test_an_unknown_context(context):
    with pytest.raises(ValueError, match=rf"context must be 'hidden'.*got {context!r}"):
        RevEncoder(nn.Embedding(SOURCE_WORDS, FEATURES), RevGRU(FEATURES, HIDDEN), context)


def test_a_context_of_more_units_than_there_are():
    with pytest.raises(ValueError, match=r"asks for 9 units.*has 8.*Use 'hidden'"):
        RevEncoder(nn.Embedding(SOURCE_WORDS, FEATURES), RevGRU(FEATURES, HIDDEN), "slice:9")


def test_an_embedding_of_another_size():
    encoder = RevEncoder(nn.Embedding(SOURCE_WORDS, 5), RevGRU(FEATURES, HIDDEN))
    with pytest.raises(ValueError, match=r"read_in must return.*6\), got \(.*5\)"):
        encoder(batch().source)


def test_options_out_of_range():
    embedding, rnn = nn.Embedding(SOURCE_WORDS, FEATURES), RevGRU(FEATURES, HIDDEN)
    with pytest.raises(ValueError, match="chunk_steps must be a positive integer or None, got 0"):
        RevEncoder(embedding, rnn, chunk_steps=0)
    with pytest.raises(ValueError, match="read_out_steps must be a positive integer"):
        RevDecoder(
            embedding,
            rnn,
            LuongAttention(HIDDEN, HIDDEN),
            LinearCrossEntropy(HIDDEN, TARGET_WORDS),
            read_out_steps=0,
        )


def test_a_weight_that_changes_between_encoder_and_backward():
    for name in ("encoder.sequence.read_in.weight", "encoder.sequence.rnns.0.weight_hh_l0"):
        model = translator()
        loss, _ = model(batch())
        with torch.no_grad():
            model.get_parameter(name).mul_(1.1)
        with pytest.raises(ReversalError, match="changed in place"):
            loss.backward()


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_slices_that_change_between_encoder_and_backward(mode):
    model, data = translator(context="slice:3"), batch()
    model.decoder.sequence.gradients = mode
    source, state = model.encoder(data.source, data.source_lengths)
    loss, _ = model.decoder(data.tokens, data.targets, source, state, data.target_lengths)
    with torch.no_grad():
        source.slices.add_(0.1)
    with pytest.raises(ReversalError, match="changed in place"):
        loss.backward()


def test_a_mode_that_changes_between_encoder_and_decoder():
    model, data = translator(embedding_dropout=nn.Dropout(0.5)), batch()
    source, state = model.encoder(data.source, data.source_lengths)
    model.eval()
    arguments = (data.tokens, data.targets, source, state, data.target_lengths)
    with pytest.raises(ValueError, match=r"embedding is in another mode.*Call train\(\) or eval"):
        model.decoder(*arguments)
    model.train()
    model.decoder(*arguments)[0].backward()


def test_attention_and_generator_of_another_kind_or_size():
    embedding, rnn = nn.Embedding(TARGET_WORDS, FEATURES), RevLSTM(FEATURES, HIDDEN)
    attention, generator = LuongAttention(HIDDEN, 4), LinearCrossEntropy(HIDDEN, TARGET_WORDS)
    with pytest.raises(ValueError, match="generator must be a LinearCrossEntropy.*got Linear"):
        RevDecoder(embedding, rnn, attention, nn.Linear(HIDDEN, TARGET_WORDS))
    with pytest.raises(ValueError, match="attention must be a LuongAttention.*got Identity"):
        RevDecoder(embedding, rnn, nn.Identity(), generator)
    with pytest.raises(ValueError, match=f"rnn has {HIDDEN} hidden units, the attention takes 12"):
        RevDecoder(embedding, rnn, LuongAttention(12, 4), generator)


def test_source_and_state_in_the_wrong_order():
    model, data = translator(), batch()
    source, state = model.encoder(data.source, data.source_lengths)
    with pytest.raises(ValueError, match=r"source must be what an encoder returned.*got tuple"):
        model.decoder(data.tokens, data.targets, state, source, data.target_lengths)
