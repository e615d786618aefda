"""Make the embedded excerpt from the public-domain text of War and Peace.

    python -m recipes.ptb.embedded.build pg2600.txt recipes/ptb/embedded

The input is the plain text of Project Gutenberg no. 2600 (Tolstoy, translated by Louise and Aylmer
Maude, UTF-8). The output is the first `CHARACTERS` of Book One, without the Gutenberg header and
footer, in the form in which the Penn Treebank is commonly used for language models: one sentence
a line, lower case, no punctuation, clitics split off (`do n't`), numbers `N`, rare words `<unk>`.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

BEGIN, END = "BOOK ONE: 1805", "*** END OF THIS PROJECT GUTENBERG"
CHARACTERS = 300_000
MIN_COUNT = 2
SPLITS = {"train": 0.86, "valid": 0.07, "test": 0.07}

QUOTES_AND_DASH = "\u2018\u201c\u201d\u2014"
HEADING = re.compile(r"^(BOOK [A-Z]+: .*|CHAPTER [IVXLC]+)$")
ABBREVIATION = re.compile(r"\b(st|mr|mrs|dr|m|mme|mlle)\.", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?]+['\"]*(?:\s+|$)")
CLITIC = re.compile(r"(?<=[a-z])(n't|'(?:s|re|ve|ll|d|m))\b")
NUMBER = re.compile(r"\b\d[\d,.]*(?:st|nd|rd|th)?\b")
WORD = re.compile(r"N\b|(?:n't|'(?:s|re|ve|ll|d|m))\b|[a-z]+(?:[-.][a-z]+)*\.?")


def excerpt(book: str) -> str:
    """Book One to the end of the paragraph in which `CHARACTERS` is reached, without headings."""
    body = book[book.rindex(BEGIN) : book.index(END)]
    body = body[: body.index("\n\n", CHARACTERS)]
    return "\n".join(line for line in body.splitlines() if not HEADING.match(line.strip()))


def normalise(text: str) -> str:
    r"""ASCII letters and plain quotes, lower case, `N` for numbers.

    >>> normalise("Pávlovna\u2019s 2,000 men\u2014yes")
    "pavlovna's N men yes"
    """
    text = text.replace("\u2019", "'").translate(dict.fromkeys(map(ord, QUOTES_AND_DASH), " "))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return NUMBER.sub("N", text.lower())


def sentences(text: str) -> list[list[str]]:
    r"""Split a text into sentences of words.

    >>> sentences("\u201cI don\u2019t know,\u201d said he. Is it St. Petersburg?")
    [['i', 'do', "n't", 'know', 'said', 'he'], ['is', 'it', 'st.', 'petersburg']]
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat = ABBREVIATION.sub(lambda match: match[1] + "\0", " ".join(paragraph.split()))
        for sentence in SENTENCE_END.split(normalise(flat)):
            words = WORD.findall(CLITIC.sub(r" \1", sentence.replace("\0", ".")))
            if words:
                found.append(words)
    return found


def split(lines: list[list[str]]) -> dict[str, list[list[str]]]:
    """Cut into contiguous parts and replace words that the training part holds rarely."""
    parts, start = {}, 0
    for name, share in SPLITS.items():
        stop = len(lines) if name == "test" else start + round(share * len(lines))
        parts[name], start = lines[start:stop], stop
    counts = Counter(word for line in parts["train"] for word in line)
    return {
        name: [[word if counts[word] >= MIN_COUNT else "<unk>" for word in line] for line in part]
        for name, part in parts.items()
    }


def main(source: Path, folder: Path) -> None:
    """Write `train.txt`, `valid.txt` and `test.txt` to `folder`."""
    parts = split(sentences(excerpt(source.read_text(encoding="utf-8"))))
    for name, lines in parts.items():
        text = "".join(" ".join(line) + "\n" for line in lines)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
