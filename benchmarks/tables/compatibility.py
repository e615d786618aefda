"""The compatibility matrix as tables, one for each axis."""

from benchmarks.tables.markdown import grouped, read, table

_SIGNS = {"works": "✓", "refused": "✗", "not applicable": "n/a", "failed": "**failed**"}


def show(axis: str) -> str:
    """The table of an axis, and why some of its cells are not ticked."""
    rows = [row for row in read("compatibility")["rows"] if row["axis"] == axis]
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row["reason"]))

    def sign(row: dict[str, str]) -> str:
        note = f"<sup>{reasons.index(row['reason']) + 1}</sup>" if row["reason"] else ""
        return _SIGNS[row["outcome"]] + note

    lines = grouped(rows, "callback")
    values = list(dict.fromkeys(row["value"] for row in rows))
    body = [[f"`{name}`", *map(sign, cells)] for (name,), cells in lines.items()]
    notes = [f"{n}. {text[0].upper()}{text[1:]}." for n, text in enumerate(reasons, 1)]
    return "\n\n".join([table(["", *values], body, texts=1 + len(values)), "\n".join(notes)])
