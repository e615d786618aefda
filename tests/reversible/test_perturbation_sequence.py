"""Perturbed layers in a `ReversibleSequence`, an encoder and a decoder: as outside, or alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import HiddenSlice, ReversibleSequence, memory_report
from tests.helpers.passes import (
    CELLS,
    assert_close,
    gradients,
    initial_states,
    normal,
    recovered_states,
    weighted_sum,
)
from tests.helpers.perturbed_layers import DELTA, PERTURBED, explicit_weights, perturbed
from tests.helpers.properties import examples
from tests.helpers.seq2seq import Batch, batch, translator
from tests.helpers.sequences import (
    DOUBLE,
    Plain,
    as_parts,
    as_state,
    language_model,
    loss_and_gradients,
    tokens,
)


def perturbed_model(cell, *args, **kwargs):
    """A small language model in float64."""
    sequence = language_model(PERTURBED[cell], *args, **kwargs)
    for rnn in sequence.rnns:
        rnn.perturb()
    return sequence


@examples(max_examples=25)
@given(
    cell=st.sampled_from(CELLS),
    bits=st.sampled_from([0, 3, None]),
    num_layers=st.integers(1, 2),
    batch_first=st.booleans(),
    shape=st.tuples(st.integers(1, 13), st.integers(1, 3)),
    chunk_steps=st.integers(1, 15),
    mode=st.sampled_from(["forward", "backward"]),
)
def test_loss_state_and_gradients_are_those_of_the_layers_alone(
    cell, bits, num_layers, batch_first, shape, chunk_steps, mode
):
    sequence = perturbed_model(
        cell,
        num_layers,
        batch_first=batch_first,
        max_forget_bits=bits,
        chunk_steps=chunk_steps,
        gradients=mode,
    )
    shape = shape[::-1] if batch_first else shape
    x, y = tokens(*shape), tokens(*shape, seed=1)
    states = initial_states(sequence.rnns[0], shape[int(not batch_first)])
    named = dict(sequence.named_parameters()) | {f"state{i}": s for i, s in enumerate(states)}
    loss, state, found = loss_and_gradients(sequence, named, x, as_state(states), y)
    assert sequence.rnns[0].calls == [f"l{n}" for n in range(num_layers)], "once per pass"
    plain = loss_and_gradients(Plain(sequence), named, x, as_state(states), y)
    torch.testing.assert_close(loss, plain[0], rtol=DOUBLE, atol=DOUBLE)
    for a, b in zip(as_parts(state), as_parts(plain[1]), strict=True):
        assert torch.equal(a, b)
    assert_close(found, plain[2], DOUBLE)
    assert found[f"rnns.0.{DELTA}l0"].abs().sum() > 0 or shape == (1, 1)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("segment_steps", [None, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_every_sequence_of_a_packed_batch_runs_as_alone_by_explicit_weights(
    cell, segment_steps, mode
):
    """With segments too, which run forward again: by the perturbation of the first time."""
    lengths = [2, 7, 1, 5]
    options = {"chunk_steps": 3, "segment_steps": segment_steps, "gradients": mode}
    sequence, ordinary = perturbed_model(cell, 2, **options), language_model(cell, 2, **options)
    x, y = tokens(7, 4), tokens(7, 4, seed=1)
    packed = [
        pack_padded_sequence(part, torch.tensor(lengths), enforce_sorted=False) for part in (x, y)
    ]
    named = dict(sequence.named_parameters())
    loss, state, found = loss_and_gradients(sequence, named, packed[0], None, packed[1])

    weights = {name: value for name, value in named.items() if DELTA not in name}
    explicit = explicit_weights(sequence.rnns[0], 4)
    weights |= {f"rnns.0.{name}": weight for name, weight in explicit.items()}
    truth = torch.zeros((), dtype=torch.float64)
    for n, length in enumerate(lengths):
        own = {name: w[n] if "weight_hh" in name else w for name, w in weights.items()}
        part = (x[:length, n : n + 1], None, y[:length, n : n + 1])
        own_loss, own_state = functional_call(ordinary, own, part)
        truth = truth + own_loss
        for mine, theirs in zip(as_parts(state), as_parts(own_state), strict=True):
            assert torch.equal(mine[:, n : n + 1], theirs)
    torch.testing.assert_close(loss, truth, rtol=DOUBLE, atol=DOUBLE)
    assert_close(found, gradients(3.0 * truth, named), DOUBLE)


@pytest.mark.parametrize("cell", CELLS)
def test_a_pass_without_the_gradient_of_the_perturbation_has_the_other_ones(cell):
    sequence, x, y = perturbed_model(cell, 2, chunk_steps=3), tokens(8, 3), tokens(8, 3, seed=1)
    named = dict(sequence.named_parameters())
    truth = loss_and_gradients(sequence, named, x, None, y)[2]
    sequence.rnns[0].delta_l1.requires_grad_(False)
    found = loss_and_gradients(sequence, named, x, None, y)[2]
    del truth[f"rnns.0.{DELTA}l1"]
    assert_close(found, truth, 0.0)


@pytest.mark.parametrize("cell", CELLS)
def test_kept_units_are_those_of_the_layer_and_reversed_exactly(cell):
    def run(model):
        kept, _ = model(x)
        return kept, gradients(weighted_sum([kept]), named)

    rnn, x = perturbed(cell, 3, 10), normal(20, 4, 3).requires_grad_()
    named = {**dict(rnn.named_parameters()), "x": x}
    sequence = ReversibleSequence(nn.Identity(), rnn, HiddenSlice(10), chunk_steps=3)
    with recovered_states() as passes:
        kept, found = run(sequence)
    assert all(recovered.empty for recovered in passes)
    output, truth = run(rnn)
    # Kept units forget with plain rounding, which moves them by 2^-20 per step.
    torch.testing.assert_close(kept, output, rtol=0, atol=1e-4)
    assert_close(found, truth, 5e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_reversed_exactly_in_segments(cell):
    """The backward sweep itself compares states, and runs segments forward again."""
    rnn = perturbed(cell, 20, 30, 2)
    sequence = ReversibleSequence(nn.Identity(), rnn, nn.Identity(), segment_steps=40)
    output, _ = sequence(normal(300, 5, 20))
    weighted_sum([output]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    assert memory_report(sequence).stored_bits > 0


@pytest.mark.parametrize("cell", CELLS)
def test_a_perturbation_that_is_not_finite_is_named_with_its_layer(cell):
    sequence = perturbed_model(cell, 2)
    with torch.no_grad():
        sequence.rnns[0].delta_l1[1, 1] = torch.nan
    with pytest.raises(ValueError, match="infinity in the recurrent perturbation of .* layer 1"):
        sequence(tokens(5, 2), None, tokens(5, 2, seed=1))


# --- translation ---------------------------------------------------------------------------------


def sentence(pairs: Batch, n: int) -> Batch:
    """One sentence pair of a batch."""
    return Batch(
        pairs.source[:, n : n + 1],
        [pairs.source_lengths[n]],
        pairs.tokens[:, n : n + 1],
        pairs.targets[:, n : n + 1],
        [pairs.target_lengths[n]],
    )


def translators(cell):
    """A perturbed encoder and decoder, and ordinary ones of the same parameters."""
    model = translator(PERTURBED[cell])
    for side in (model.encoder, model.decoder):
        side.rnn.perturb()
    ordinary = translator(cell)
    ordinary.load_state_dict(model.state_dict(), strict=False)
    return model, ordinary


@pytest.mark.parametrize("cell", CELLS)
def test_sentences_are_translated_as_alone_by_explicit_weights(cell):
    """Ragged batches in any order, through encoder and decoder, with all gradients."""
    model, ordinary = translators(cell)
    pairs = batch()
    count = len(pairs.source_lengths)
    named = dict(model.named_parameters())
    loss, _ = model(pairs)
    found = gradients(loss, named)

    prefixes = ("encoder.sequence.rnns.0.", "decoder.sequence.rnns.0.")
    weights = {name: value for name, value in named.items() if f".{DELTA}" not in name}
    for prefix, side in zip(prefixes, (model.encoder, model.decoder), strict=True):
        explicit = explicit_weights(side.rnn, count)
        weights |= {prefix + name: weight for name, weight in explicit.items()}
    losses = []
    for n in range(count):
        own = {name: w[n] if "weight_hh" in name else w for name, w in weights.items()}
        losses.append(functional_call(ordinary, own, (sentence(pairs, n),))[0])
    truth = torch.stack(losses).sum()
    torch.testing.assert_close(loss, truth, rtol=DOUBLE, atol=DOUBLE)
    assert_close(found, gradients(truth, named), DOUBLE)
    assert all(found[f"{prefix}{DELTA}l0"].abs().sum() > 0 for prefix in prefixes)
