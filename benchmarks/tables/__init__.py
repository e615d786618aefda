"""The tables of the documentation, made of `benchmarks/results/*.json`.

`show(name)` is what was compared, a table, and where and how it was measured. Each table is made by
a function with the name of its results file, whose docstring says what was compared.
"""

from benchmarks.tables import flipout, markdown, posterior, recipes, reversible
from benchmarks.tables.markdown import TABLES, read, show, source

__all__ = [
    "TABLES",
    "flipout",
    "markdown",
    "posterior",
    "read",
    "recipes",
    "reversible",
    "show",
    "source",
]
