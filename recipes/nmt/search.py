"""Greedy and beam search over any decoder that gives the log-probabilities of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

State = Any
"""Whatever a decoder carries from step to step. Only its own `step` and `select` look inside."""


class Decoder(Protocol):
    """What a model must offer to be searched. A row is one hypothesis of one sentence."""

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token per row: int64 (N,) to log-probabilities (N, V) and the new state."""

    def select(self, state: State, rows: Tensor) -> State:
        """The state of these rows in this order; int64 (M,), a row may repeat or be left out."""


class Translation(NamedTuple):
    """What a search returns for a sentence.

    Attributes:
        tokens: without the tokens that begin and end a sentence.
        score: `log_prob` divided by the length penalty; translations compete by it.
        log_prob: of all tokens, the end included, in nats.
        finished: whether it came to its end; False if it was cut at the limit.
    """

    tokens: list[int]
    score: float
    log_prob: float
    finished: bool


def length_penalty_of(length: int, alpha: float) -> float:
    """Divisor of a log-probability, so that long translations can win against short ones.

    lp(n) = ((5 + n) / 6) ** alpha             (Wu et al., 2016, arXiv 1609.08144, equation 14)

    Args:
        length: n, tokens of the translation, its end included.
        alpha: 0 compares log-probabilities; at 1 they are nearly means over the tokens.

    >>> length_penalty_of(7, alpha=1.0)
    2.0
    """
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def greedy_search(
    decoder: Decoder,
    state: State,
    batch: int,
    begin: int,
    end: int,
    max_steps: Sequence[int],
    *,
    forbidden: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> list[Translation]:
    """Take the likeliest token at every step; among equals the lowest.

    Args:
        decoder: the model.
        state: its state for `batch` rows, one per sentence.
        batch: number of sentences.
        begin: the token that is read first.
        end: the token that ends a translation.
        max_steps: limit of each sentence in new tokens, its end included.
        forbidden: tokens that are never generated.
        device: where the decoder wants its tokens.

    Returns:
        One translation per sentence; its score is its log-probability.

    Raises:
        ValueError: for arguments that do not fit together, and for log-probabilities that are nan
            or positive, or -inf for all tokens.
    """
    _check(batch, end, max_steps, forbidden)
    found: list[list[int]] = [[] for _ in range(batch)]
    log_probs = [0.0] * batch
    finished = [False] * batch

    alive = list(range(batch))
    tokens = torch.full((batch,), begin, device=device)
    while alive:
        scores, state = _step(decoder, tokens, state, forbidden)
        values, tokens = scores.max(dim=1)  # documented to find the first of equals
        rows = []
        for row, (sentence, value, token) in enumerate(
            zip(alive, values.tolist(), tokens.tolist(), strict=True)
        ):
            if value == -math.inf:
                raise _dead_end(len(found[sentence]))
            log_probs[sentence] += value
            finished[sentence] = token == end
            if token != end:
                found[sentence].append(token)
                if len(found[sentence]) < max_steps[sentence]:
                    rows.append(row)
        if 0 < len(rows) < len(alive):
            kept = torch.tensor(rows, device=device)
            state, tokens = decoder.select(state, kept), tokens[kept]
        alive = [alive[row] for row in rows]
    return [Translation(found[i], log_probs[i], log_probs[i], finished[i]) for i in range(batch)]


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    state: State,
    batch: int,
    begin: int,
    end: int,
    max_steps: Sequence[int],
    beam_size: int = 5,
    length_penalty: float = 1.0,
    n_best: int = 1,
    *,
    forbidden: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> list[list[Translation]]:
    """Follow the `beam_size` likeliest hypotheses of every sentence, all in one call of `step`.

    A sentence goes on until no live hypothesis can beat the finished ones any more, and leaves the
    batch then. Hypotheses of the same log-probability are taken in the order of their parents,
    then of their tokens.

    Args:
        decoder: the model.
        state: its state for `batch` rows, one per sentence.
        batch: number of sentences.
        begin: the token that is read first.
        end: the token that ends a translation.
        max_steps: limit of each sentence in new tokens, its end included.
        beam_size: live hypotheses per sentence; 1 with `length_penalty=0` is greedy search.
        length_penalty: the alpha of `length_penalty_of`, at least 0.
        n_best: finished translations to look for, at most `beam_size`.
        forbidden: tokens that are never generated.
        device: where the decoder wants its tokens.

    Returns:
        For each sentence up to `n_best` finished translations, best score first; or only the best
        unfinished one, if none came to its end within the limit.

    Raises:
        ValueError: for arguments that do not fit together, and for log-probabilities that are nan
            or positive, or -inf for all tokens.
    """
    _check(batch, end, max_steps, forbidden)
    if not 1 <= n_best <= beam_size:
        raise ValueError(
            "beam_size must be at least 1 and n_best between 1 and beam_size, got "
            f"beam_size={beam_size} and n_best={n_best}."
        )
    if not 0 <= length_penalty < math.inf:
        raise ValueError(
            "length_penalty must be 0 or more: a negative one prefers short translations, and the "
            f"search would not know when to stop. Got {length_penalty}; use 0 for none."
        )
    beams = [_Beam(limit, end, beam_size, length_penalty, n_best) for limit in max_steps]

    alive = beams
    tokens = torch.full((batch,), begin, device=device)
    while alive:
        scores, state = _step(decoder, tokens, state, forbidden)
        # A beam takes at most beam_size continuations of a row, and the end. That all rows offer as
        # many lets it be filled however many hypotheses end.
        choices = [part.tolist() for part in _largest(scores, min(beam_size + 1, scores.shape[1]))]
        rows: list[int] = []
        first = 0
        for beam in alive:
            last = first + len(beam.live)
            parents = beam.advance(*(part[first:last] for part in choices))
            rows += [first + parent for parent in parents]
            first = last
        alive = [beam for beam in alive if beam.live]
        if alive:
            state = decoder.select(state, torch.tensor(rows, device=device))
            newest = [hypothesis.tokens[-1] for beam in alive for hypothesis in beam.live]
            tokens = torch.tensor(newest, device=device)
    return [beam.translations for beam in beams]


class _Hypothesis(NamedTuple):
    """A translation that goes on."""

    log_prob: float
    tokens: list[int]


class _Beam:
    """The hypotheses of one sentence: those that go on, likeliest first, and those that ended."""

    def __init__(self, limit: int, end: int, size: int, alpha: float, n_best: int) -> None:
        self.limit = limit
        self.end = end
        self.size = size
        self.alpha = alpha
        self.n_best = n_best
        self.steps = 0
        self.live = [_Hypothesis(0.0, [])]
        self.translations: list[Translation] = []

    def advance(self, values: list[list[float]], tokens: list[list[int]]) -> list[int]:
        """Take the likeliest continuations; none goes on once the sentence is decided.

        Args:
            values: log-probabilities of the choices of each live hypothesis.
            tokens: these choices.

        Returns:
            The parent of each new live hypothesis: its place among the live ones before.
        """
        self.steps += 1
        # The smallest tuple is the likeliest; among equals, the lowest parent and then token.
        candidates = sorted(
            (-(hypothesis.log_prob + value), parent, token)
            for parent, hypothesis in enumerate(self.live)
            for value, token in zip(values[parent], tokens[parent], strict=True)
            if value > -math.inf
        )
        if not candidates and not self.translations:
            raise _dead_end(self.steps - 1)

        live: list[_Hypothesis] = []
        parents: list[int] = []
        for cost, parent, token in candidates:
            if len(live) == self.size:
                break
            if token == self.end:  # likelier than one that goes on, and takes no place from it
                self._add(-cost, self.live[parent].tokens, finished=True)
            else:
                live.append(_Hypothesis(-cost, [*self.live[parent].tokens, token]))
                parents.append(parent)

        if self.steps == self.limit and not self.translations:
            self._add(*live[0], finished=False)
        decided = self.steps == self.limit or not live or self._beats(live[0])
        self.live = [] if decided else live
        return [] if decided else parents

    def _add(self, log_prob: float, tokens: list[int], finished: bool) -> None:
        score = log_prob / length_penalty_of(self.steps, self.alpha)
        self.translations.append(Translation(tokens, score, log_prob, finished))
        self.translations.sort(key=lambda translation: -translation.score)
        del self.translations[self.n_best :]

    def _beats(self, best: _Hypothesis) -> bool:
        """Whether the finished ones beat whatever may become of the likeliest live one.

        Its log-probability can only fall, and no penalty is larger than that of the limit.
        """
        attainable = best.log_prob / length_penalty_of(self.limit, self.alpha)
        return len(self.translations) == self.n_best and self.translations[-1].score >= attainable


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in falling order, and their columns; both (N, count).

    `topk` alone does not say which of several equals it takes. Here they are the first ones.
    """
    least = scores.topk(count).values[:, -1:]
    rows, columns = (scores >= least).nonzero(as_tuple=True)  # by rows, then by columns
    values = scores[rows, columns]
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    starts = torch.searchsorted(rows, torch.arange(len(scores), device=rows.device))
    order = order[starts.unsqueeze(1) + torch.arange(count, device=rows.device)]
    return values[order], columns[order]


def _step(
    decoder: Decoder, tokens: Tensor, state: State, forbidden: Sequence[int]
) -> tuple[Tensor, State]:
    """A step of the decoder, checked, with -inf for the tokens that may not be generated."""
    log_probs, state = decoder.step(tokens, state)
    if log_probs.ndim != 2 or len(log_probs) != len(tokens):
        raise ValueError(
            f"The decoder read {len(tokens)} tokens and must return log-probabilities of shape "
            f"({len(tokens)}, vocabulary), got {tuple(log_probs.shape)}."
        )
    highest = log_probs.max().item()  # nan if any is
    if not highest <= 1e-3:  # rounding may leave a little above 0
        raise ValueError(
            "The decoder must return log-probabilities, which are at most 0, got a highest value "
            f"of {highest}. If it is nan, look for it in the parameters of the model; if it is "
            "positive, apply log_softmax to the logits."
        )
    if forbidden:
        columns = torch.tensor(list(forbidden), device=log_probs.device)
        log_probs = log_probs.index_fill(1, columns, -math.inf)
    return log_probs, state


def _check(batch: int, end: int, max_steps: Sequence[int], forbidden: Sequence[int]) -> None:
    if len(max_steps) != batch or any(limit < 1 for limit in max_steps):
        raise ValueError(
            f"max_steps must hold one limit of at least 1 for each of {batch} sentences, got "
            f"{list(max_steps)}."
        )
    if end in forbidden:
        raise ValueError(
            f"The end of a translation (token {end}) must not be forbidden, got "
            f"forbidden={list(forbidden)}."
        )


def _dead_end(length: int) -> ValueError:
    return ValueError(
        f"No token may follow: all log-probabilities after {length} tokens are -inf in all "
        "hypotheses of a sentence. Allow at least the end of the translation there."
    )
