"""How RevEncoder and RevDecoder are used: decoding, tying, precision, memory, processes."""

import copy
import io
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn

from lightning_revflip.reversible import (
    LinearCrossEntropy,
    LockedDropout,
    LuongAttention,
    RevDecoder,
    RevEncoder,
    RevGRU,
    memory_report,
)
from lightning_revflip.reversible.buffer import WordStream, information_bits
from tests.helpers.passes import CELLS, assert_close, gradients, saved_by
from tests.helpers.reference_cell import ReferenceRNN
from tests.helpers.seq2seq import (
    FEATURES,
    HIDDEN,
    TARGET_WORDS,
    Batch,
    Plain,
    Seq2Seq,
    batch,
    translator,
)
from tests.helpers.sequences import DOUBLE, as_parts, as_state


def encoded(model, data):
    """What to attend to, in memory, and the state to start from."""
    source, state = model.encoder(data.source, data.source_lengths)
    return source.in_memory(), state


def decoded(model, tokens, source, state):
    """Logits, (steps, batch, V), of one call per step."""
    logits = []
    for step in tokens.split(1):
        out, state = model.decoder(step, None, source, state)
        logits.append(out)
    return torch.cat(logits)


# --- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["hidden", "slice:3", "embedding", "embedding+slice:3"])
@pytest.mark.parametrize("cell", CELLS)
def test_decoding_step_by_step_gives_the_logits_of_the_whole(cell, context):
    model, data = translator(cell, context, 2), batch()
    with torch.no_grad():
        source, state = encoded(model, data)
        whole, _ = model.decoder(data.tokens, None, source, state)
        steps = decoded(model, data.tokens, source, state)
    # A fresh buffer in every call rounds the states differently, by one unit of 2^-20 a step.
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-4)


def test_the_loss_is_that_of_the_logits():
    model, data = translator(), batch()
    with torch.no_grad():
        source, state = model.encoder(data.source, data.source_lengths)
        logits, _ = model.decoder(data.tokens, None, source, state)
        loss, _ = model.decoder(data.tokens, data.targets, source, state)
    truth = nn.functional.cross_entropy(
        logits.flatten(0, 1), data.targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [[2, 0, 3, 1], [1, 1, 1], [3]])
def test_sentences_are_selected_and_repeated_with_their_states(rows):
    model, data, rows = translator(), batch(), torch.tensor(rows)
    with torch.no_grad():
        source, state = encoded(model, data)
        truth = decoded(model, data.tokens, source, state).index_select(1, rows)
        selected = source.select(rows)
        states = as_state([part.index_select(1, rows) for part in as_parts(state)])
        found = decoded(model, data.tokens.index_select(1, rows), selected, states)
    assert torch.equal(selected.mask, source.mask[rows])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("context", ["slice:3", "embedding+slice:3"])
def test_evaluation_and_training_may_follow_each_other(context, mode):
    """Whichever comes first: modules are checked in the first call of a kind."""
    data = batch()
    for turns in (("evaluate", "train"), ("train", "evaluate")):
        model = translator(context=context).eval()
        named = dict(model.named_parameters())
        truth, _ = Plain(model)(data)
        for turn in turns:
            if turn == "evaluate":
                with mode():
                    loss, _ = model(data)
                    source, state = encoded(model, data)
                    logits = decoded(model, data.tokens, source.select(torch.arange(4)), state)
                assert logits.isfinite().all()
            else:
                loss, _ = model(data)
                true_gradients = gradients(truth, named, retain_graph=True)
                assert_close(gradients(loss, named), true_gradients, DOUBLE)
            torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=0)


def test_a_source_may_be_decoded_more_than_once():
    model, data = translator(), batch()
    others = batch(target_lengths=(2, 2, 5, 3), seed=1)
    source, state = model.encoder(data.source, data.source_lengths)
    losses = [
        model.decoder(d.tokens, d.targets, source, state, d.target_lengths)[0]
        for d in (data, others)
    ]
    others.source, others.source_lengths = data.source, data.source_lengths
    named = dict(model.named_parameters())
    truth = sum(Plain(model)(d)[0] for d in (data, others))
    assert_close(gradients(sum(losses), named), gradients(truth, named), DOUBLE)


# --- shared parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["slice:3", "embedding+slice:3"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_parameter_that_all_parts_share_has_the_sum_of_their_gradients(mode, context):
    torch.manual_seed(0)
    embedding = nn.Embedding(TARGET_WORDS, HIDDEN)
    encoder = RevEncoder(embedding, RevGRU(HIDDEN, HIDDEN), context, chunk_steps=3)
    decoder = RevDecoder(
        embedding,
        RevGRU(HIDDEN, HIDDEN),
        LuongAttention(HIDDEN, encoder.context_size),
        LinearCrossEntropy(HIDDEN, TARGET_WORDS),
        chunk_steps=2,
    )
    decoder.read_out.generator.weight = embedding.weight
    decoder.sequence.gradients = mode
    model, data = Seq2Seq(encoder, decoder).double(), batch()
    data.source = data.source % TARGET_WORDS
    named = dict(model.named_parameters())
    assert sum(parameter is embedding.weight for parameter in named.values()) == 1
    weight = embedding.weight
    for _ in range(2):  # and it is still there after a call
        loss, _ = model(data)
        assert embedding.weight is weight
        found = gradients(loss, named)
        assert embedding.weight is weight
        assert_close(found, gradients(Plain(model)(data)[0], named), DOUBLE)


def test_weights_may_be_replaced_for_a_call():
    model, data = translator(), batch()
    named = dict(model.named_parameters())
    halved = {name: 0.5 * parameter for name, parameter in named.items()}
    loss, _ = torch.func.functional_call(model, halved, (data,))
    found = gradients(loss, named)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    truth = gradients(Plain(other)(data)[0], dict(other.named_parameters()))
    assert_close(found, {name: 0.5 * grad for name, grad in truth.items()}, DOUBLE)


def test_is_copied_pickled_and_restored():
    model, data = translator(), batch()
    loss, _ = model(data)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(data)[0], loss)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["hidden", "slice:3", "embedding", "embedding+slice:3"])
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_autocast_is_close(cell, context):
    model, data = translator(cell, context, 2, dtype=torch.float32), batch()
    named = dict(model.named_parameters())
    truth, _ = model(data)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(data)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=2e-2, atol=0)
    found = gradients(loss, named)
    assert all(found[name].dtype == torch.float32 for name in found)
    assert_close(found, gradients(truth, named), 0.1)


def test_a_model_in_bfloat16_is_close():
    model, data = translator(dtype=torch.float32), batch()
    truth, _ = model(data)
    loss, _ = model.bfloat16()(data)
    torch.testing.assert_close(loss.float(), truth, rtol=5e-2, atol=0)
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_saved_tensors_may_be_moved_between_the_passes():
    model, data = translator(), batch()
    named = dict(model.named_parameters())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss, _ = model(data)
    assert_close(gradients(loss, named), gradients(Plain(model)(data)[0], named), DOUBLE)


def test_float16_autocast_scales_before_it_differentiates():
    model, data = translator(dtype=torch.float32), batch()
    named = dict(model.named_parameters())
    truth = gradients(model(data)[0], named)
    with torch.autocast("cpu", torch.float16):
        loss, _ = model(data)
    assert_close(gradients(loss, named), truth, 0.1)


def test_locked_dropout_in_the_read_out_holds_for_a_sentence():
    model, data = translator(dropout=LockedDropout(HIDDEN, 0.5), read_out_steps=1), batch()
    model(data)
    masks = []
    model.decoder.read_out.dropout.register_forward_hook(
        lambda module, args, output: masks.append(output != 0)
    )
    model(data)
    first = max(masks, key=len)  # of a step in which all sentences run
    assert all(torch.equal(mask, first[: len(mask)]) for mask in masks)
    assert 0 < first.double().mean() < 1


# --- memory --------------------------------------------------------------------------------------


def pushed_words():
    """Counts the words that streams are given, by the order in which streams were made."""
    counts = []
    original = WordStream.push

    def push(self, words):
        counts.append(words.numel())
        original(self, words)

    return counts, patch.object(WordStream, "push", push)


@pytest.mark.parametrize("cell", CELLS)
def test_reports_are_those_counted_by_hand(cell):
    model, data = translator(cell, "embedding+slice:3"), batch([6, 6], [9, 9])
    data = Batch(data.source, None, data.tokens, data.targets, None)  # 7 and 10 steps
    states = 1 if cell is RevGRU else 2
    counts, counting = pushed_words()
    with counting:
        source, state = model.encoder(data.source)
        encoder_words = sum(counts)
        model.decoder(data.tokens, data.targets, source, state)
    decoder_words = sum(counts) - encoder_words

    embedded = model.encoder.sequence.read_in(data.source)
    reference = ReferenceRNN.of(model.encoder.rnn, sliced=3)
    _, finals = reference(dict(model.encoder.rnn.named_parameters()), embedded)
    (layer,) = memory_report(model.encoder).layers
    assert layer.name == "sequence.rnns.0.l0"
    assert layer.unit_steps == 7 * 2 * HIDDEN * states
    assert layer.float_state_bits == 64 * layer.unit_steps
    assert layer.slice_bits == 64 * 7 * 2 * 3
    assert layer.stored_bits == 16 * encoder_words + 32 * 2 * HIDDEN * states
    gates = torch.cat([gate.flatten() for gate in reference.forgotten])
    assert gates.numel() == layer.unit_steps - 7 * 2 * 3
    truth = information_bits(torch.bincount(gates, minlength=1025))
    assert layer.information_bits == pytest.approx(truth, rel=1e-12)

    embedded = model.decoder.sequence.read_in(data.tokens)
    reference = ReferenceRNN.of(model.decoder.rnn)
    reference(dict(model.decoder.rnn.named_parameters()), embedded, finals)
    (layer,) = memory_report(model.decoder).layers
    assert layer.unit_steps == 10 * 2 * HIDDEN * states
    assert layer.slice_bits == 0
    assert layer.stored_bits == 16 * decoder_words + 32 * 2 * HIDDEN * states
    gates = torch.cat([gate.flatten() for gate in reference.forgotten])
    truth = information_bits(torch.bincount(gates, minlength=1025))
    assert layer.information_bits == pytest.approx(truth, rel=1e-12)


def test_only_real_steps_are_counted():
    model, data = translator(), batch()
    model(data)
    for part, lengths in (
        (model.encoder, data.source_lengths),
        (model.decoder, data.target_lengths),
    ):
        (layer,) = memory_report(part).layers
        assert layer.unit_steps == sum(lengths) * HIDDEN * 2
    assert memory_report(model.encoder).slice_bits == 64 * sum(data.source_lengths) * 3


def test_the_graph_of_a_translation_keeps_slices_but_no_states_and_no_logits():
    model, data = translator(RevGRU, "embedding+slice:3"), batch([40] * 4, [50] * 4)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    model(data)  # modules are tried out in the first call
    _, saved = saved_by(lambda: model(data))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    beyond = sorted(sizes[address] for address in sizes.keys() - weights)
    assert beyond[-1] == max(8 * 40 * 4 * 3, 8 * 41 * 4)  # slices, or the source tokens
    assert sum(beyond) < 8 * 40 * 4 * HIDDEN + 8 * 50 * 4 * FEATURES


# --- processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    def start(rank: int, processes: int) -> subprocess.Popen[bytes]:
        command = ["-m", "tests.helpers.ddp_seq2seq", str(tmp_path), str(rank), str(processes)]
        return subprocess.Popen(
            [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    for process in [start(0, 2), start(1, 2), start(0, 1)]:
        assert process.wait(timeout=120) == 0
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert_close(two, one, DOUBLE)
