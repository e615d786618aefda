"""Tokenised sentence pairs, and which of them to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_info


class Sentences(NamedTuple):
    """The tokens of a sentence pair, and the number of its line from 0."""

    line: int
    source: list[str]
    target: list[str]


def usable(
    sentences: Sequence[Sentences], max_length: int | None, description: str
) -> list[Sentences]:
    """Without the training pairs that are empty or too long; how many is logged.

    Args:
        sentences: of the training text.
        max_length: tokens that either side may have; None: any number.
        description: of the text, for the error.

    Raises:
        ValueError: if nothing is left.
    """
    full = [pair for pair in sentences if pair.source and pair.target]
    left = [
        pair
        for pair in full
        if max_length is None or max(len(pair.source), len(pair.target)) <= max_length
    ]
    empty, long = len(sentences) - len(full), len(full) - len(left)
    left_out = []
    if empty:
        left_out.append(f"{empty:,} with an empty side")
    if long:
        left_out.append(f"{long:,} longer than {max_length} tokens")
    text = f"Training pairs: {len(left):,} of {len(sentences):,}"
    text += f"; left out: {', '.join(left_out)}" if left_out else ""
    if not left:
        raise ValueError(f"Nothing is left to train on. {text}. ({description})")
    rank_zero_info(text)
    return left
