"""Tokens <-> numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNKNOWN, BEGIN, END = range(4)


class Vocabulary:
    """The tokens that a model knows; a token's place in the list is its number.

    The first four are special: `<pad>` fills up short sentences, `<unk>` stands for tokens that
    are not in the vocabulary, `<bos>` and `<eos>` begin and end a sentence. A token of the text
    that looks like one of them counts as unknown.

    Args:
        tokens: all tokens, without repetition, the four special ones first.

    Raises:
        ValueError: if the special tokens do not stand first, or a token stands twice.

    Example:
        >>> vocabulary = Vocabulary.of([["a", "dog"], ["a", "cat"]])
        >>> vocabulary.tokens
        ['<pad>', '<unk>', '<bos>', '<eos>', 'a', 'dog', 'cat']
        >>> vocabulary.encode(["a", "bird", "<eos>"])
        [4, 1, 1]
        >>> vocabulary.decode([2, 4, 6, 3, 0])
        ['a', 'cat']
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = list(tokens)
        self._number = {token: number for number, token in enumerate(self.tokens)}
        if tuple(self.tokens[:4]) != SPECIALS:
            raise ValueError(
                f"A vocabulary begins with {', '.join(SPECIALS)}, got {self.tokens[:4]}. Make it "
                "with Vocabulary.of(sentences)."
            )
        if len(self._number) != len(self.tokens):
            repeated = next(t for n, t in enumerate(self.tokens) if self._number[t] != n)
            raise ValueError(f"The vocabulary holds {repeated!r} more than once.")
        for special in SPECIALS:
            del self._number[special]

    @classmethod
    def of(
        cls, sentences: Iterable[list[str]], min_count: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """The tokens of some sentences, the most frequent first.

        Args:
            sentences: tokens of each sentence. Equally frequent ones keep the order in which they
                first appear.
            min_count: leave out tokens that appear less often.
            max_size: keep this many tokens, with the four special ones. None: all.

        Raises:
            ValueError: if `max_size` leaves room for the special tokens alone.
        """
        if max_size is not None and max_size <= len(SPECIALS):
            raise ValueError(
                f"A vocabulary of at most {max_size} tokens has no room beside the {len(SPECIALS)} "
                f"special ones. Use {len(SPECIALS) + 1} or more."
            )
        counts = Counter(token for sentence in sentences for token in sentence)
        for special in SPECIALS:
            counts.pop(special, None)
        # most_common() sorts stably, and a Counter keeps the order of first appearance.
        common = [token for token, count in counts.most_common() if count >= min_count]
        return cls([*SPECIALS, *common][:max_size])

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    __hash__ = None  # type: ignore[assignment]  # two equal ones may be edited apart

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The numbers of tokens, `UNKNOWN` for unseen ones; nothing is added at the ends."""
        return [self._number.get(token, UNKNOWN) for token in tokens]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """The tokens of some numbers (a list or a 1-d tensor), up to the first `END`.

        `PAD` and `BEGIN` are left out; `UNKNOWN` becomes `<unk>`.
        """
        tokens = []
        for number in map(int, numbers):
            if number == END:
                break
            if number not in (PAD, BEGIN):
                tokens.append(self.tokens[number])
        return tokens

    def state_dict(self) -> dict[str, Any]:
        """A plain list of strings, for a checkpoint."""
        return {"tokens": self.tokens}
