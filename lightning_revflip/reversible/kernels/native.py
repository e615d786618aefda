"""The functions of `native.c`; where they cannot be compiled, the torch path of `cells.py` runs."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_revflip._native import ARRAY, DOUBLE, FLOAT, SIZE, NativeLibrary

_SIGNATURES: dict[str, list[Any]] = {
    "sigmoids": [SIZE, ARRAY, ARRAY],
    "multiply": [SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY],
    "divide": [SIZE, SIZE, ARRAY, ARRAY, ARRAY, ARRAY, SIZE],
    "to_float": [SIZE, SIZE, ARRAY, SIZE, SIZE, DOUBLE, ARRAY],
    "lstm_gates": [SIZE, SIZE, ARRAY, ARRAY, SIZE, FLOAT, FLOAT, ARRAY],
    "lstm_add": [SIZE, SIZE, ARRAY, ARRAY, DOUBLE],
    "lstm_subtract": [SIZE, SIZE, ARRAY, ARRAY, DOUBLE, ARRAY],
    "lstm_vjp": [SIZE, SIZE, *[ARRAY] * 7, FLOAT, ARRAY, SIZE, ARRAY, ARRAY],
    "gru_reset": [SIZE, SIZE, ARRAY, ARRAY, SIZE, ARRAY, FLOAT, FLOAT, ARRAY, ARRAY],
    "gru_candidate": [SIZE, SIZE, ARRAY, ARRAY, SIZE],
    "gru_add": [SIZE, ARRAY, ARRAY, ARRAY, DOUBLE],
    "gru_vjp_candidate": [SIZE, SIZE, *[ARRAY] * 5, SIZE],
    "gru_vjp_gates": [SIZE, SIZE, *[ARRAY] * 7, FLOAT, ARRAY, SIZE, ARRAY, ARRAY],
}

LIBRARY = NativeLibrary(
    Path(__file__).with_name("native.c"),
    _SIGNATURES,
    {"multiply": SIZE, "divide": SIZE},
    flags=["-ffp-contract=off"],  # the same bits from every compiler
    without="Reversible layers",
)

call = LIBRARY.call


def sigmoid(x: Tensor) -> Tensor:
    """The sigmoid of the compiled cells, for dense float32 of any shape; others derive from it."""
    out = x.new_empty(x.shape)
    call("sigmoids", x.numel(), x, out)
    return out
