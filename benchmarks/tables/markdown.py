"""Results files as Markdown: what was compared, a table, and where and how it was measured."""

import inspect
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import measure

Results = dict[str, Any]
TABLES: dict[str, Callable[[Results], str]] = {}


def read(name: str) -> Results:
    """The contents of `results/<name>.json`."""
    return json.loads((measure.RESULTS / f"{name}.json").read_text())


def show(name: str) -> str:
    """Sentence, table and source of a results file."""
    make, results = TABLES[name], read(name)
    sentence = " ".join((inspect.getdoc(make) or "").split())
    return f"{sentence}\n\n{make(results)}\n\n{source(name)}\n"


def source(name: str) -> str:
    """Machine, versions, command and date of a results file."""
    results = read(name)
    machine, note = results["environment"], results.get("note", "")
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"*{machine['device']}, {threads}, Python {machine['python']}, torch {machine['torch']}, "
        f"{machine['date']}:* `{machine['command']}`, `benchmarks/results/{name}.json`. {note}"
    ).rstrip()


def shown(make: Callable[[Results], str]) -> Callable[[Results], str]:
    """Register the table of the results file with this name."""
    TABLES[make.__name__] = make
    return make


def table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table whose first columns, `texts` in number, are text and the rest numbers.

    Columns without any entry are left out.
    """
    columns = list(zip(*rows, strict=True))
    columns = [
        (name, "---" if place < texts else "--:", *column)
        for place, (name, column) in enumerate(zip(header, columns, strict=True))
        if any(str(entry) for entry in column)
    ]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in zip(*columns, strict=True))


def ms(times: dict[str, float]) -> str:
    """The median in milliseconds."""
    milliseconds = 1e3 * times["median"]
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def mean(rows: Iterable[Results], key: str, digits: int, scale: float = 1.0) -> str:
    """Mean and standard deviation over the rows that have the key."""
    values = [scale * row[key] for row in rows if key in row]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def grouped(rows: Iterable[Results], *keys: str) -> dict[tuple[Any, ...], list[Results]]:
    """Rows by what they have under some keys, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Results]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def perplexities(results: Results) -> str:
    """Perplexity, bits and saving of language models after their last step."""
    return table(
        ["cell", "validation perplexity", "of the ordinary cell's", "bits", "layer keeps"],
        (
            [
                f"`{row['cell']}`",
                f"{row['val_perplexity']:.2f}",
                f"{row['perplexity_ratio']:.3f}" if "perplexity_ratio" in row else "",
                f"{row['bits_per_unit_step']:.2f}" if "bits_per_unit_step" in row else "",
                f"{row['savings']:.0f}x less" if "savings" in row else "",
            ]
            for row in results["rows"]
        ),
    )
