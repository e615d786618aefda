"""RevEncoder and RevDecoder compute what plain autograd does with the same model."""

import math
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.reversible.kernels import torch_only
from lightning_revflip.reversible.kernels.native import LIBRARY, sigmoid
from lightning_revflip.reversible.kernels.native_cells import NativeStorage
from tests.helpers.exact_arithmetic import ExactArithmetic
from tests.helpers.passes import CELLS, assert_close, gradients, weighted_sum
from tests.helpers.properties import examples
from tests.helpers.seq2seq import (
    CONTEXTS,
    TARGET_WORDS,
    Plain,
    batch,
    states_of,
    translator,
)
from tests.helpers.sequences import DOUBLE, as_parts

SINGLE = 1e-5


def named_tensors(model, states=()):
    return dict(model.named_parameters()) | {f"state{i}": state for i, state in enumerate(states)}


def assert_agrees(model, data, tolerance=DOUBLE, with_state=True):
    """Loss, final state and gradients, of a loss that is scaled, are those of plain autograd."""
    states, state = states_of(model, len(data.source_lengths)) if with_state else ([], None)
    named = named_tensors(model, states)
    loss, final = model(data, state)
    true_loss, true_finals = Plain(model)(data, states)
    torch.testing.assert_close(loss, true_loss, rtol=tolerance, atol=0)
    assert all(map(torch.equal, as_parts(final), true_finals))
    found = gradients(3.0 * loss, named)
    assert_close(found, gradients(3.0 * true_loss, named), tolerance)
    return found


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cell", CELLS)
def test_loss_state_and_gradients_are_those_of_plain_autograd(
    cell, context, num_layers, batch_first
):
    model = translator(cell, context, num_layers, batch_first)
    found = assert_agrees(model, batch(batch_first=batch_first))
    unseen = {name for name, grad in found.items() if not grad.any()}
    assert not unseen, "every parameter and state takes part"


@st.composite
def translations(draw):
    """A model and a batch: everything that a user can choose."""
    batch_first = draw(st.booleans())
    model = translator(
        draw(st.sampled_from(CELLS)),
        draw(st.sampled_from(CONTEXTS)),
        draw(st.integers(1, 2)),
        batch_first,
        max_forget_bits=draw(st.sampled_from([0, 1, 3, None])),
        chunk_steps=draw(st.none() | st.integers(1, 9)),
        read_out_steps=draw(st.none() | st.integers(1, 9)),
    )
    model.decoder.sequence.gradients = draw(st.sampled_from(["forward", "backward"]))
    pairs = st.tuples(st.integers(1, 8), st.integers(1, 8))
    lengths = draw(st.lists(pairs, min_size=1, max_size=5))
    return model, batch(*zip(*lengths, strict=True), batch_first=batch_first), draw(st.booleans())


@given(translations())
@examples(max_examples=30)
def test_gradients_agree_however_the_work_is_divided(case):
    assert_agrees(case[0], case[1], with_state=case[2])


@pytest.mark.slow
@given(translations())
@examples(max_examples=400)
def test_gradients_agree_in_many_cases(case):
    assert_agrees(case[0], case[1], with_state=case[2])


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cell", CELLS)
def test_float32_gradients_agree(cell, context, implementation):
    native = implementation == "native" and LIBRARY.available
    with ExitStack() as stack:
        stack.enter_context(patch.object(NativeStorage, "lanes", None))  # as the plain cell has
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if not native:
            stack.enter_context(torch_only())
        stack.enter_context(ExactArithmetic(sigmoid if native else None))
        assert_agrees(translator(cell, context, 2, dtype=torch.float32), batch(), SINGLE)


@pytest.mark.parametrize("context", CONTEXTS)
def test_one_sentence_of_one_word(context):
    assert_agrees(translator(context=context), batch([1], [1]))


@pytest.mark.parametrize("cell", CELLS)
def test_batches_without_lengths_are_used_to_the_end(cell):
    model = translator(cell)
    data = batch([5, 5], [4, 4])
    whole = replace(data, source_lengths=None, target_lengths=None)
    full = replace(data, source_lengths=[6, 6], target_lengths=[5, 5])
    named = named_tensors(model)
    loss, truth = model(whole)[0], model(full)[0]
    assert torch.equal(loss, truth)
    assert_close(gradients(loss, named), gradients(truth, named), 0.0)


def test_lengths_may_be_a_tensor():
    model, data = translator(), batch()
    lengths = {
        name: torch.tensor(getattr(data, name)) for name in ("source_lengths", "target_lengths")
    }
    assert torch.equal(model(replace(data, **lengths))[0], model(data)[0])


# --- the right step ------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_context_is_that_of_the_plain_model(cell, context):
    model, data = translator(cell, context, 2), batch()
    source, _ = model.encoder(data.source, data.source_lengths)
    truth, mask, _ = Plain(model).context(data)
    steps = max(data.source_lengths)
    held = source.in_memory()
    assert held.size == source.size == model.encoder.context_size
    assert torch.equal(held.mask, mask[:, :steps])
    assert torch.equal(held.context[held.mask], truth[mask])


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_by_one_step_of_a_source_reaches_that_step(cell, context, step):
    model, data = translator(cell, context), batch()
    named = named_tensors(model.encoder)
    source, _ = model.encoder(data.source, data.source_lengths)
    truth, _, _ = Plain(model).context(data)
    found, true_gradients = (
        gradients(weighted_sum([rows[2, step]]), named)
        for rows in (source.in_memory().context, truth)
    )
    assert_close(found, true_gradients, DOUBLE)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cell", CELLS)
def test_attention_to_one_step_only_gives_its_gradient(cell, context, step):
    model, data = translator(cell, context), batch([5, 4, 7], [3, 6, 1])
    named = named_tensors(model)
    source, state = model.encoder(data.source, data.source_lengths)
    mask = torch.zeros_like(source.mask)
    mask[:, step] = True
    targets = (data.tokens, data.targets)
    narrow = replace(source, mask=mask)
    loss, _ = model.decoder(*targets, narrow, state, data.target_lengths)

    plain = Plain(model)
    true_context, whole, finals = plain.context(data)
    only = torch.zeros_like(whole)
    only[:, step] = True
    with patch.object(Plain, "context", lambda *args: (true_context, only, finals)):
        true_loss, _ = plain(data)
    torch.testing.assert_close(loss, true_loss, rtol=DOUBLE, atol=0)
    assert_close(gradients(loss, named), gradients(true_loss, named), DOUBLE)


# --- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_what_padding_holds_changes_no_bit(cell, dtype, batch_first):
    model, data = translator(cell, batch_first=batch_first, dtype=dtype), batch()

    def padded(tokens, lengths, fill):
        """Tokens whose padding is `fill`."""
        real = torch.arange(len(tokens))[:, None] < torch.tensor(lengths)
        filled = torch.where(real, tokens, torch.tensor(fill))
        return filled.t() if batch_first else filled

    results = []
    for fill in (0, 7):
        filled = replace(
            data,
            source=padded(data.source, data.source_lengths, fill),
            tokens=padded(data.tokens, data.target_lengths, fill),
            targets=padded(data.targets, data.target_lengths, fill),
        )
        loss, final = model(filled)
        results.append([loss, *as_parts(final), *gradients(loss, named_tensors(model)).values()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("cell", CELLS)
def test_padded_steps_leave_the_final_states_untouched(cell):
    model, data = translator(cell, num_layers=2), batch()
    _, final = model.encoder(data.source, data.source_lengths)
    for number, length in enumerate(data.source_lengths):
        _, alone = model.encoder(data.source[:length, number : number + 1])
        for together, single in zip(as_parts(final), as_parts(alone), strict=True):
            torch.testing.assert_close(together[:, number : number + 1], single)


def test_the_loss_of_a_batch_is_the_sum_over_its_sentences():
    model, data = translator(), batch()
    singles = []
    for i, (length, target_length) in enumerate(
        zip(data.source_lengths, data.target_lengths, strict=True)
    ):
        source = data.source[:length, i : i + 1]
        tokens, targets = (t[:target_length, i : i + 1] for t in (data.tokens, data.targets))
        context, state = model.encoder(source)
        singles.append(model.decoder(tokens, targets, context, state)[0])
    torch.testing.assert_close(model(data)[0], sum(singles), rtol=1e-6, atol=0)


# --- chunks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["hidden", "embedding+slice:3"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_at_a_time_change_nothing_beyond_rounding(cell, context):
    data, results = batch(), []
    for chunk_steps, read_out_steps in ((1, 1), (4, 3), (None, None)):
        model = translator(cell, context, 2, chunk_steps=chunk_steps, read_out_steps=read_out_steps)
        loss, _ = model(data)
        results.append({"loss": loss} | gradients(loss, named_tensors(model)))
    for other in results[1:]:
        assert_close(other, results[0], DOUBLE)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 50])
def test_the_read_out_gets_few_equal_parts_of_a_chunk_whose_logits_fit_the_budget(size):
    decoder = translator(chunk_steps=20, read_out_steps=None).decoder
    decoder.memory_budget = 4 * TARGET_WORDS * 12  # the logits of 24 words fit twice of it
    steps, most = decoder.chosen_read_out_steps(size), max(1, 24 // size)
    parts = math.ceil(20 / most)
    assert 1 <= steps <= most
    assert (parts - 1) * steps < 20 <= parts * steps
    decoder.read_out_steps = 5
    assert decoder.chosen_read_out_steps(size) == 5


# --- training ------------------------------------------------------------------------------------


def test_gradients_accumulate_over_batches():
    model, batches = translator(), [batch(), batch([3, 6], [2, 2], seed=1)]
    for data in batches:
        model(data)[0].backward()
    truth = gradients(sum(Plain(model)(data)[0] for data in batches), named_tensors(model))
    assert_close({n: p.grad for n, p in model.named_parameters()}, truth, DOUBLE)


FROZEN = {
    "encoder": ["encoder"],
    "source embedding": ["encoder.sequence.read_in"],
    "encoder and its attention": ["encoder", "decoder.sequence.read_out.attention"],
    "decoder": ["decoder"],
}


@pytest.mark.parametrize("context", ["slice:3", "embedding+slice:3"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts_get_no_gradient_and_the_others_theirs(frozen, context):
    model = translator(context=context)
    for name in FROZEN[frozen]:
        model.get_submodule(name).requires_grad_(False)
    found = assert_agrees(model, batch(), with_state=False)
    model(batch())[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in found)


@pytest.mark.parametrize("how", ["no_grad", "eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_does_not_depend_on_whether_gradients_are_wanted(how, dtype):
    model, data = translator(dtype=dtype), batch()
    truth = model(data)[0].detach()
    if how == "eval":
        model.eval()
    if how == "frozen":
        model.requires_grad_(False)
    with torch.set_grad_enabled(how != "no_grad"):
        loss, _ = model(data)
    assert loss.requires_grad == (how == "eval")
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-6, atol=0)


def test_the_decoder_takes_what_it_attends_to_in_memory():
    """With the gradient of the encoder's states and embeddings."""
    model, data = translator(), batch()
    source, state = model.encoder(data.source, data.source_lengths)
    targets = (data.tokens, data.targets)
    loss, _ = model.decoder(*targets, source.in_memory(), state, data.target_lengths)
    true_loss, _ = Plain(model)(data)
    named = named_tensors(model)
    torch.testing.assert_close(loss, true_loss, rtol=DOUBLE, atol=0)
    assert_close(gradients(loss, named), gradients(true_loss, named), DOUBLE)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_logits_have_the_gradients_of_plain_autograd(cell, batch_first):
    model, data = translator(cell, batch_first=batch_first), batch(batch_first=batch_first)
    source, state = model.encoder(data.source, data.source_lengths)
    logits, _ = model.decoder(data.tokens, None, source, state, data.target_lengths)
    plain = Plain(model)
    attended, _ = plain.attended(data, *plain.context(data))
    truth = model.decoder.read_out.generator.logits(attended)
    if batch_first:
        truth = truth.transpose(0, 1)
    real = torch.arange(logits.shape[int(batch_first)])
    lengths = torch.tensor(data.target_lengths)
    mask = real < lengths[:, None] if batch_first else real[:, None] < lengths
    assert not logits[~mask].any()
    torch.testing.assert_close(logits[mask], truth[mask], rtol=DOUBLE, atol=DOUBLE)
    named = named_tensors(model)
    found = gradients(weighted_sum([logits[mask]]), named)
    assert_close(found, gradients(weighted_sum([truth[mask]]), named), DOUBLE)
