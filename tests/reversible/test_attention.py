"""LuongAttention is its formula; what it attends to is read from a text."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.reversible import LuongAttention
from lightning_revflip.reversible.attention import ContextSpec
from tests.helpers.passes import assert_close, gradients, make, normal, weighted_sum
from tests.helpers.properties import examples


def by_loops(attention, hidden, context, mask):
    """The formulas of the paper, for one target step and one source step after the other."""
    w, w_c = attention.query.weight.t(), attention.combine.weight
    attended, all_weights = torch.zeros_like(hidden), []
    for t in range(hidden.shape[0]):
        for b in range(hidden.shape[1]):
            h, real = hidden[t, b], [s for s in range(context.shape[1]) if mask[b, s]]
            exponentials = {s: math.exp(float(h @ w @ context[b, s])) for s in real}
            total = sum(exponentials.values())
            weights = [exponentials.get(s, 0.0) / total for s in range(context.shape[1])]
            summary = sum(weights[s] * context[b, s] for s in real)
            attended[t, b] = torch.tanh(w_c @ torch.cat([summary, h]))
            all_weights.append(weights)
    weights = torch.tensor(all_weights, dtype=hidden.dtype)
    return attended, weights.view(*hidden.shape[:2], -1)


def masked(lengths, steps):
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def arranged(steps=4, sizes=(6, 5), lengths=(3, 1, 7), source_steps=7):
    """An attention in float64, hidden states, a context, and a mask with holes."""
    attention = make(LuongAttention, *sizes, dtype=torch.float64)
    hidden = normal(steps, len(lengths), sizes[0], dtype=torch.float64).requires_grad_()
    context = normal(len(lengths), source_steps, sizes[1], seed=1, dtype=torch.float64)
    return attention, hidden, context.requires_grad_(), masked(lengths, source_steps)


@given(
    steps=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
@examples(max_examples=40)
def test_attention_is_the_formula_of_the_paper(steps, sizes, lengths, seed):
    attention, hidden, context, mask = arranged(steps, sizes, lengths, 5)
    # Real steps need not be the first ones.
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    mask = mask[:, order]
    with torch.no_grad():
        found, weights = attention(hidden, context, mask)
        truth, true_weights = by_loops(attention, hidden, context, mask)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, true_weights, rtol=1e-12, atol=1e-12)


def test_finite_differences_confirm_the_gradient():
    attention, hidden, context, mask = arranged(2, (2, 3), (2, 1), 3)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def run(hidden, context, *weights):
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(attention, named, (hidden, context, mask))

    assert torch.autograd.gradcheck(run, (hidden, context, *parameters))


def test_weights_sum_to_one_over_real_steps_and_are_zero_elsewhere():
    attention, hidden, context, mask = arranged()
    _, weights = attention(hidden, context, mask)
    assert weights.shape == (4, 3, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 3, dtype=torch.float64))
    assert not weights[:, ~mask].any()
    assert (weights[:, mask] > 0).all()


def test_what_padded_steps_hold_has_no_influence():
    attention, hidden, context, mask = arranged()
    truth, _ = attention(hidden, context, mask)
    changed = torch.where(mask.unsqueeze(2), context, torch.full_like(context, 1e6))
    assert torch.equal(attention(hidden, changed, mask)[0], truth)


def test_padded_steps_get_no_gradient_and_real_steps_one():
    attention, hidden, context, mask = arranged()
    attended, _ = attention(hidden, context, mask)
    gradient = torch.autograd.grad(weighted_sum([attended]), context)[0]
    assert not gradient[~mask].any()
    assert (gradient[mask].norm(dim=1) > 0).all()


def test_a_single_real_step_is_all_that_is_seen():
    attention, hidden, context, _ = arranged()
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 2] = True
    attended, weights = attention(hidden, context, mask)
    assert torch.equal(weights[:, :, 2], torch.ones(4, 3, dtype=torch.float64))
    seen = torch.cat([context[:, 2].expand(4, 3, 5), hidden], dim=2)
    torch.testing.assert_close(attended, attention.combine(seen).tanh())


def test_a_context_in_float32_goes_with_states_in_bfloat16():
    attention, hidden, context, mask = arranged()
    truth, _ = attention(hidden, context, mask)
    attention.bfloat16()
    attended, _ = attention(hidden.bfloat16(), context.float(), mask)
    assert attended.dtype == torch.bfloat16
    assert_close({"attended": attended}, {"attended": truth}, 0.05)


def test_autocast_is_close():
    attention, hidden, context, mask = arranged()
    attention.float()
    named = dict(attention.named_parameters())
    truth, _ = attention(hidden.float(), context.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        attended, _ = attention(hidden.float(), context.float(), mask)
    assert_close({"attended": attended}, {"attended": truth}, 0.05)
    found = gradients(weighted_sum([attended]), named)
    assert_close(found, gradients(weighted_sum([truth]), named), 0.1)


# --- what is attended to -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "embedding", "units", "size"),
    [
        ("hidden", False, None, 300),
        ("slice:1", False, 1, 1),
        ("slice:20", False, 20, 20),
        ("slice:300", False, 300, 300),
        ("embedding", True, 0, 100),
        ("embedding+slice:60", True, 60, 160),
        ("embedding+hidden", True, None, 400),
    ],
)
def test_a_text_says_what_is_attended_to(text, embedding, units, size):
    spec = ContextSpec.parse(text)
    assert spec == ContextSpec(embedding, units)
    assert spec.size(embedding_size=100, hidden_size=300) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "Hidden", "slice", "slice:", "slice:0", "slice:-1", "slice:2.5", "slice:03"),
        *("embedding+", "embedding+embedding", "slice:3+embedding", "hidden ", None, 20),
    ],
)
def test_an_unknown_text_is_refused_with_the_known_ones(text):
    given_text = re.escape(repr(text))
    with pytest.raises(ValueError, match=rf"must be 'hidden'.*'slice:k'.*got {given_text}\."):
        ContextSpec.parse(text)


def test_more_units_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"asks for 9 units.*has 8.*Use 'hidden'"):
        ContextSpec.parse("slice:9").size(embedding_size=4, hidden_size=8)
