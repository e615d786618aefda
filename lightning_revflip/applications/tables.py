"""Tables of numbers as text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """A table in Markdown that is aligned as text too.

    Args:
        header: name of each column.
        rows: cells.
        names: so many columns from the left are names, aligned left; others are numbers.

    Examples:
        >>> print(markdown_table(["name", "n"], [["a", "1"], ["b", "20"]]))
        | name |  n |
        |------|---:|
        | a    |  1 |
        | b    | 20 |
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = [
        "-" * (width + 2) if column < names else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    ]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    return "\n".join([text(header), f"|{'|'.join(rule)}|", *map(text, rows)])
