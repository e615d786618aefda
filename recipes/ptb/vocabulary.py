"""Text <-> numbers, at the level of words or of characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Level = Literal["word", "char"]

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"


def tokenize(text: str, level: Level) -> Iterator[str]:
    """Yield the words or characters of a text, with `<eos>` for every line break.

    >>> list(tokenize("no it was n't\\nblack monday", "word"))
    ['no', 'it', 'was', "n't", '<eos>', 'black', 'monday']
    >>> list(tokenize("a b\\n", "char"))
    ['a', ' ', 'b', '<eos>']
    """
    for number, line in enumerate(text.split("\n")):
        if number > 0:
            yield END_OF_LINE
        yield from line.split() if level == "word" else line


class Vocabulary:
    """The tokens that a model knows; a token's place in the list is its number.

    `<eos>` is number 0 and `<unk>` number 1.

    Args:
        tokens: all tokens, without repetition, `<eos>` and `<unk>` first.
        level: whether the tokens are words or characters.

    Raises:
        ValueError: if the two special tokens do not stand first, or a token stands twice.

    Example:
        >>> vocabulary = Vocabulary.of("no it was n't\\n", "word")
        >>> vocabulary.encode("no it was monday")
        tensor([2, 3, 4, 1])
        >>> vocabulary.decode([2, 3, 4, 1])
        'no it was <unk>'
    """

    def __init__(self, tokens: Iterable[str], level: Level) -> None:
        self.tokens = list(tokens)
        self.level = level
        self._number = {token: number for number, token in enumerate(self.tokens)}
        if self.tokens[:2] != [END_OF_LINE, UNKNOWN]:
            raise ValueError(
                f"A vocabulary begins with {END_OF_LINE} and {UNKNOWN}, got {self.tokens[:2]}. "
                "Make it with Vocabulary.of(text, level)."
            )
        if len(self._number) != len(self.tokens):
            repeated = next(t for n, t in enumerate(self.tokens) if self._number[t] != n)
            raise ValueError(f"The vocabulary holds {repeated!r} more than once.")

    @classmethod
    def of(cls, text: str, level: Level) -> Vocabulary:
        """The vocabulary of a text, in the order in which the tokens first appear."""
        return cls(dict.fromkeys([END_OF_LINE, UNKNOWN, *tokenize(text, level)]), level)

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.level == other.level
            and self.tokens == other.tokens
        )

    __hash__ = None  # type: ignore[assignment]  # two equal ones may be edited apart

    def encode(self, text: str) -> Tensor:
        """The numbers of a text's tokens, int64, shape (number of tokens,); unseen ones are 1."""
        unknown = self._number[UNKNOWN]
        numbers = [self._number.get(token, unknown) for token in tokenize(text, self.level)]
        return torch.tensor(numbers, dtype=torch.int64)

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of some numbers (a list or a 1-d tensor): the inverse of `encode`."""
        glue = " " if self.level == "word" else ""
        lines: list[list[str]] = [[]]
        for number in numbers:
            token = self.tokens[int(number)]
            if token == END_OF_LINE:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(glue.join(line) for line in lines)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for a checkpoint."""
        return {"tokens": self.tokens, "level": self.level}
