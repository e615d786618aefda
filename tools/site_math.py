"""Formulas for MkDocs: blocks of LaTeX fenced as `math`, which GitHub draws too, become MathML."""

from typing import Any

from latex2mathml.converter import convert


def block(source: str, *_: Any, **__: Any) -> str:
    """A formula on lines of its own, as pymdownx.superfences wants it from a custom fence."""
    return convert(source, display="block")
