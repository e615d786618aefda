"""Lines <-> tokens, at the level of words or of characters."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

Level = Literal["word", "char"]


class Tokenizer:
    """Cuts lines into words or characters, and puts lines together again.

    Words are those of the Moses tokenizer (by sacremoses), which sets punctuation apart and knows
    abbreviations and apostrophes of some thirty languages. In a language that it does not know it
    looks for English abbreviations and sets every apostrophe apart, without a warning. Undoing it
    is a matter of rules as well: blanks around quotation marks, for example, may differ from those
    of the original line.

    Args:
        lang: code of the language, such as `de`.
        level: whether tokens are words or characters.
        lower_case: whether tokens are in lower case.

    Raises:
        ValueError: for an unknown level.
        ModuleNotFoundError: when words are wanted, without the extra `recipes`.

    Example:
        >>> words = Tokenizer("en")
        >>> words.tokenize("Two dogs,  one ball.")
        ['two', 'dogs', ',', 'one', 'ball', '.']
        >>> words.detokenize(["two", "dogs", ",", "one", "ball", "."])
        'two dogs, one ball.'
        >>> Tokenizer("en", "char").tokenize("A  b")
        ['a', ' ', 'b']
    """

    def __init__(self, lang: str, level: Level = "word", lower_case: bool = True) -> None:
        if level not in ("word", "char"):
            raise ValueError(f"The level of a tokenizer must be 'word' or 'char', got {level!r}.")
        self.lang = lang
        self.level: Level = level
        self.lower_case = lower_case

    def __repr__(self) -> str:
        case = "lower case" if self.lower_case else "case kept"
        return f"Tokenizer({self.lang}, {self.level}, {case})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.state_dict() == other.state_dict()

    __hash__ = None  # type: ignore[assignment]  # two equal ones may be edited apart

    def normalize(self, line: str) -> str:
        """The line with single blanks between words and none at its ends, in lower case if set."""
        line = " ".join(line.split())
        return line.lower() if self.lower_case else line

    def tokenize(self, line: str) -> list[str]:
        """The words or characters of a line; none if it is blank."""
        if self.level == "char":
            return list(self.normalize(line))
        # Lower case comes last: abbreviations such as `Mr.` are known by their capital letter.
        words = self._moses[0].tokenize(line, escape=False)
        return [word.lower() for word in words] if self.lower_case else words

    def detokenize(self, tokens: list[str]) -> str:
        """A line of text: the normalised line itself for characters, a likely one for words."""
        if self.level == "char":
            return "".join(tokens)
        return self._moses[1].detokenize(tokens, unescape=False)

    @cached_property
    def _moses(self) -> tuple[Any, Any]:
        try:
            from sacremoses import MosesDetokenizer, MosesTokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Word tokens are made by sacremoses: pip install 'lightning-revflip[recipes]'; or "
                "use characters: --data.source_level char --data.target_level char."
            ) from error
        return MosesTokenizer(self.lang), MosesDetokenizer(self.lang)

    def state_dict(self) -> dict[str, Any]:
        """The arguments, for a checkpoint."""
        return {"lang": self.lang, "level": self.level, "lower_case": self.lower_case}
