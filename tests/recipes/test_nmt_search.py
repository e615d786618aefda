"""Greedy and beam search of the NMT recipe, against enumeration and plain reference searches."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recipes.nmt.search import beam_search, greedy_search, length_penalty_of

END = 0
BEGIN = -1  # outside of the vocabulary of the tables: these never generate it


class Table:
    """A decoder that looks its log-probabilities up by all tokens so far.

    Prefixes are the nodes of a tree: the root is 0, and the children of n begin at n * V + 1.

    Args:
        log_probs: shape (sentences, prefixes, V), of prefixes shorter than the depth of the tree.
    """

    def __init__(self, log_probs):
        self.log_probs = log_probs
        self.rows = []  # of every call of `step`

    def start(self):
        batch = len(self.log_probs)
        return {"sentence": torch.arange(batch), "node": (torch.zeros(batch, dtype=torch.int64),)}

    def step(self, tokens, state):
        assert tokens.dtype == torch.int64
        self.rows.append(len(tokens))
        (node,) = state["node"]
        node = torch.where(tokens == BEGIN, 0, node * self.log_probs.shape[2] + 1 + tokens)
        return self.log_probs[state["sentence"], node], {**state, "node": (node,)}

    def select(self, state, rows):
        return {"sentence": state["sentence"][rows], "node": (state["node"][0][rows],)}

    def log_prob_after(self, sentence, prefix):
        node = 0
        for token in prefix:
            node = node * self.log_probs.shape[2] + 1 + token
        return self.log_probs[sentence, node].tolist()


def random_table(seed, batch, vocabulary, depth, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    nodes = sum(vocabulary**level for level in range(depth))
    logits = 2 * torch.randn(batch, nodes, vocabulary, generator=generator, dtype=torch.float64)
    return Table(logits.round().log_softmax(2) if coarse else logits.log_softmax(2))


def every_translation(table, sentence, limit, alpha):
    """All finished translations within the limit, best first: (score, tokens)."""
    vocabulary = table.log_probs.shape[2]
    found = []
    for length in range(limit):
        for tokens in product(range(1, vocabulary), repeat=length):
            whole = [*tokens, END]
            log_prob = sum(
                table.log_prob_after(sentence, whole[:i])[token] for i, token in enumerate(whole)
            )
            found.append((log_prob / ((5 + len(whole)) / 6) ** alpha, list(tokens)))
    return sorted(found, reverse=True)


def greedy_reference(table, sentence, limit):
    tokens, log_prob = [], 0.0
    while len(tokens) < limit:
        values = table.log_prob_after(sentence, tokens)
        log_prob += max(values)
        if values.index(max(values)) == END:
            return tokens, log_prob, True
        tokens.append(values.index(max(values)))
    return tokens, log_prob, False


def beam_reference(table, sentence, limit, size, alpha):
    """Beam search of one sentence that looks at all continuations and never stops early."""
    live, finished = [(0.0, [])], []
    for length in range(1, limit + 1):
        candidates = [
            (log_prob + value, [*tokens, token])
            for log_prob, tokens in live
            for token, value in enumerate(table.log_prob_after(sentence, tokens))
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        live = []
        for log_prob, tokens in candidates:
            if len(live) < size and tokens[-1] == END:
                finished.append((log_prob / ((5 + length) / 6) ** alpha, tokens[:-1]))
            elif len(live) < size:
                live.append((log_prob, tokens))
    return sorted(finished, key=lambda f: -f[0]), live


seeds = st.integers(0, 2**32)
alphas = st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.5])
limits = st.lists(st.integers(1, 4), min_size=1, max_size=3)


# --- the truth by enumeration ----------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seed=seeds, vocabulary=st.integers(3, 5), max_steps=limits, alpha=alphas, data=st.data())
def test_an_exhaustive_beam_finds_the_best_of_all_translations(
    seed, vocabulary, max_steps, alpha, data
):
    table = random_table(seed, len(max_steps), vocabulary, max(max_steps))
    n_best = data.draw(st.integers(1, 3))
    size = vocabulary ** max(max_steps)
    found = beam_search(
        table, table.start(), len(max_steps), BEGIN, END, max_steps, size, alpha, n_best
    )
    for sentence, (limit, translations) in enumerate(zip(max_steps, found, strict=True)):
        expected = every_translation(table, sentence, limit, alpha)[:n_best]
        assert [t.tokens for t in translations] == [tokens for _, tokens in expected]
        assert [t.score for t in translations] == pytest.approx([s for s, _ in expected], abs=1e-12)
        assert all(t.finished for t in translations)


# --- against plain searches of one sentence --------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "many ties"])
@settings(max_examples=100, deadline=None)
@given(seed=seeds, vocabulary=st.integers(3, 5), max_steps=limits, alpha=alphas, data=st.data())
def test_a_beam_that_stops_early_finds_what_one_that_never_stops_finds(
    coarse, seed, vocabulary, max_steps, alpha, data
):
    table = random_table(seed, len(max_steps), vocabulary, max(max_steps), coarse)
    size = data.draw(st.integers(1, 6))
    n_best = data.draw(st.integers(1, size))
    found = beam_search(
        table, table.start(), len(max_steps), BEGIN, END, max_steps, size, alpha, n_best
    )
    for sentence, (limit, translations) in enumerate(zip(max_steps, found, strict=True)):
        finished, live = beam_reference(table, sentence, limit, size, alpha)
        expected = [tokens for _, tokens in finished[:n_best]] or [live[0][1]]
        assert [t.tokens for t in translations] == expected
        assert translations[0].finished == bool(finished)


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "many ties"])
@settings(max_examples=100, deadline=None)
@given(seed=seeds, vocabulary=st.integers(3, 5), max_steps=limits)
def test_greedy_search_and_a_beam_of_one_follow_the_largest_value(
    coarse, seed, vocabulary, max_steps
):
    table = random_table(seed, len(max_steps), vocabulary, max(max_steps), coarse)
    arguments = (table, table.start(), len(max_steps), BEGIN, END, max_steps)
    greedy = greedy_search(*arguments)
    for sentence, translation in enumerate(greedy):
        tokens, log_prob, finished = greedy_reference(table, sentence, max_steps[sentence])
        assert translation == (tokens, log_prob, log_prob, finished)
    assert beam_search(*arguments, beam_size=1, length_penalty=0) == [[t] for t in greedy]


class RecurrentDecoder(nn.Module):
    """An LSTM with random parameters, whose state has the batch in its second dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(30, 16)
        self.rnn = nn.LSTM(16, 16)
        self.softmax = nn.Linear(16, 30)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def step(self, tokens, state):
        output, state = self.rnn(self.embedding(tokens).unsqueeze(0), state)
        return self.softmax(output[0]).log_softmax(1), state

    def select(self, state, rows):
        return tuple(part[:, rows] for part in state)


def test_sentences_do_not_depend_on_their_batch():
    decoder = RecurrentDecoder().double()
    state = tuple(torch.randn(2, 1, 12, 16, dtype=torch.float64))
    max_steps = [1, 3, 9, 25, 2, 14, 7, 30, 5, 11, 1, 8]

    def search(state, max_steps):
        return [
            *greedy_search(decoder, state, len(max_steps), 1, 2, max_steps),
            *beam_search(decoder, state, len(max_steps), 1, 2, max_steps, 4, n_best=3),
        ]

    together = search(state, max_steps)
    for i, limit in enumerate(max_steps):
        greedy, best = search([part[:, i : i + 1] for part in state], [limit])
        for alone, batched in zip([greedy, *best], [together[i], *together[12 + i]], strict=True):
            assert alone.tokens == batched.tokens
            assert alone.score == pytest.approx(batched.score)


# --- when a sentence is done -----------------------------------------------------------------


def chain(*probabilities):
    """A decoder of one sentence whose log-probabilities depend on the step alone."""

    class Chain:
        def __init__(self):
            self.rows = []

        def step(self, tokens, step):
            self.rows.append(len(tokens))
            return torch.tensor([probabilities[step]] * len(tokens)).log(), step + 1

        def select(self, state, rows):
            return state

    return Chain()


def test_a_long_translation_wins_by_its_length_penalty():
    # After one token: P(end) = 0.4 at once, or two more tokens with 0.6 * 0.6 in all.
    steps = chain([0.4, 0.6], [1e-9, 1 - 1e-9], [0.6, 0.4])
    pure, penalised = (
        beam_search(steps, 0, 1, BEGIN, END, [3], 2, length_penalty=alpha)[0][0]
        for alpha in (0.0, 1.0)
    )
    assert pure.tokens == []
    assert pure.score == pytest.approx(math.log(0.4))
    assert penalised.tokens == [1, 1]
    assert penalised.log_prob == pytest.approx(math.log(0.36))
    assert penalised.score == pytest.approx(math.log(0.36) / (8 / 6))


def test_search_stops_once_no_live_hypothesis_can_win():
    # After the end with 0.9, one that goes on has 0.1 at most: log 0.9 > log 0.1 / lp(100).
    steps = chain([0.9, 0.05, 0.05])
    assert beam_search(steps, 0, 1, BEGIN, END, [100], 2, length_penalty=0.5)[0][0].tokens == []
    assert steps.rows == [1]


def test_search_goes_on_while_a_live_hypothesis_might_win():
    # log 0.3 / lp(1) < log 0.7 / lp(2): the end of step 1 does not decide.
    steps = chain([0.3, 0.7], [0.9, 0.1])
    assert beam_search(steps, 0, 1, BEGIN, END, [2], 2)[0][0].tokens == [1]
    assert steps.rows == [1, 1]


def test_sentences_that_are_done_leave_the_batch():
    generator = torch.Generator().manual_seed(0)
    nodes = sum(3**level for level in range(4))
    logits = torch.randn(3, nodes, 3, generator=generator)
    logits[:, :, END] = -20  # never the end: all go on to their limits
    table = Table(logits.log_softmax(2))
    greedy_search(table, table.start(), 3, BEGIN, END, [2, 4, 1])
    assert table.rows == [3, 2, 1, 1]
    table.rows.clear()
    beam_search(table, table.start(), 3, BEGIN, END, [2, 4, 1], beam_size=4)
    assert table.rows == [3, 2 * 2, 4, 4]


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_limits_hold_and_cut_translations_are_not_finished(search):
    never = torch.tensor([-math.inf, math.log(0.25), math.log(0.75)])
    table = Table(never.expand(2, sum(3**level for level in range(4)), 3))
    found = search(table, table.start(), 2, BEGIN, END, [4, 2])
    for limit, translation in zip([4, 2], found, strict=True):
        (best,) = translation if search is beam_search else [translation]
        assert best.tokens == [2] * limit
        assert not best.finished
        assert best.log_prob == pytest.approx(limit * math.log(0.75))
        penalty = length_penalty_of(limit, 1.0) if search is beam_search else 1
        assert best.score == pytest.approx(best.log_prob / penalty)


# --- choices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_are_taken_in_the_order_of_hypotheses_and_tokens(dtype):
    log_probs = torch.full((1, 51, 50), -math.inf, dtype=dtype)
    log_probs[:, 0, 3:] = -3.9  # 47 equal tokens, and after each of them nothing but the end
    log_probs[:, 1:, END] = -1.0
    table = Table(log_probs)
    (greedy,) = greedy_search(table, table.start(), 1, BEGIN, END, [2])
    assert greedy.tokens == [3]
    (best,) = beam_search(table, table.start(), 1, BEGIN, END, [2], 7, n_best=7)
    assert [t.tokens for t in best] == [[3], [4], [5], [6], [7], [8], [9]]


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_forbidden_tokens_are_never_generated(search, seed):
    table = random_table(seed, 2, 5, 4)
    before = table.log_probs.clone()
    found = search(table, table.start(), 2, BEGIN, END, [4, 4], forbidden=[1, 3])
    for translations in found:
        for translation in translations if search is beam_search else [translations]:
            assert not {1, 3} & set(translation.tokens)
    assert table.log_probs.equal(before)  # the decoder's own tensor is left alone


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_nothing_is_kept_for_a_backward_pass(search):
    class Recording(Table):
        def step(self, tokens, state):
            assert not torch.is_grad_enabled()
            return super().step(tokens, state)

    table = Recording(random_table(0, 1, 3, 3).log_probs.requires_grad_())
    search(table, table.start(), 1, BEGIN, END, [3])
    assert table.rows


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_no_sentences_have_no_translations(search):
    table = random_table(0, 1, 3, 1)
    assert search(table, table.start(), 0, BEGIN, END, []) == []
    assert table.rows == []


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "highest value of nan. If it is nan, look for it in the parameters"),
        (1.5, "highest value of 1.5.*apply log_softmax"),
        (-math.inf, "all log-probabilities after 1 tokens are -inf"),
    ],
)
def test_what_is_not_a_log_probability_is_an_error(search, value, message):
    log_probs = torch.full((2, 5, 4), -1.0)
    log_probs[:, 0, END] = -math.inf
    log_probs[1, 1:] = value
    table = Table(log_probs)
    with pytest.raises(ValueError, match=message):
        search(table, table.start(), 2, BEGIN, END, [2, 2])


@pytest.mark.parametrize("search", [greedy_search, beam_search])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": [3]}, r"each of 2 sentences, got \[3\]"),
        ({"max_steps": [3, 0]}, r"at least 1 for each .* got \[3, 0\]"),
        ({"forbidden": [1, END]}, r"\(token 0\) must not be forbidden, got forbidden=\[1, 0\]"),
    ],
)
def test_arguments_that_do_not_fit_together_are_rejected(search, arguments, message):
    table = random_table(0, 2, 3, 3)
    with pytest.raises(ValueError, match=message):
        search(table, table.start(), 2, BEGIN, END, **{"max_steps": [3, 3], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_size": 0}, "beam_size=0"),
        ({"beam_size": 2, "n_best": 3}, "between 1 and beam_size, got beam_size=2 and n_best=3"),
        ({"length_penalty": -0.5}, "0 or more.*Got -0.5"),
        ({"length_penalty": math.nan}, "Got nan"),
    ],
)
def test_beams_that_cannot_be_searched_are_rejected(arguments, message):
    table = random_table(0, 1, 3, 3)
    with pytest.raises(ValueError, match=message):
        beam_search(table, table.start(), 1, BEGIN, END, [3], **arguments)


def test_log_probabilities_of_another_shape_are_an_error():
    class Sequences(Table):
        def step(self, tokens, state):
            log_probs, state = super().step(tokens, state)
            return log_probs.unsqueeze(1), state

    table = Sequences(torch.full((2, 1, 3), -1.0))
    with pytest.raises(ValueError, match=r"read 2 tokens.*\(2, vocabulary\), got \(2, 1, 3\)"):
        greedy_search(table, table.start(), 2, BEGIN, END, [1, 1])
